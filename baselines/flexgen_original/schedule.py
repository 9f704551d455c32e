"""Seconds of the original's schedule: it waits for everything at every (token, layer, batch).

In the step of layer j and batch k (overlap on, two or more batches) begin: at k = 0 the load of all of layer j + 1's
weights; the load of the cache of batch k + 1; the store of what batch k - 1 has left; the computation. Then it waits
for all of them. So a step takes as long as its slowest part, and what one step leaves idle no other can use. With one
batch the layers j - 1 and j + 1 are in the place of batches. With overlap off these follow one another.
"""

from __future__ import annotations

from baselines.flexgen_original.costs import Costs
from baselines.flexgen_original.parts import Phase
from baselines.flexgen_original.placement import PlacedLayer
from flexgen_bench.core.tiers import Tier


def prefill(costs: Costs) -> Phase:
    """All prompts of a block, up to each sequence's first token."""
    block = costs.block
    phase = _pass(costs, block.prompt_len, 0.0)
    # The page cache takes what is written, and the disk gets it beside everything else; but not faster than it can.
    written = block.cache_bytes(Tier.DISK) * (1 - costs.cached) / block.stages
    read = block.weight_bytes(Tier.DISK) * (1 - costs.cached)
    phase.seconds = max(phase.seconds, written / costs.write_back_rate + read / costs.disk_rate)
    return phase


def decode_step(costs: Costs) -> Phase:
    """One more token for a block, at the mean length of its caches."""
    return _pass(costs, 1, costs.block.prompt_len + costs.block.gen_len / 2)


def _pass(costs: Costs, tokens: int, context: float) -> Phase:
    """One sweep over the layers."""
    phase, block = Phase(), costs.block
    for around, count in block.neighbours:
        if block.settings.overlap:
            phase.add_phase(_overlapped(costs, around, tokens, context), count)
        else:
            phase.add_phase(_serial(costs, around[1], tokens, context), count)
    if not block.settings.overlap:
        # Nothing is waited for, so that launches run ahead of the work.
        steps = len(block.layers) * block.settings.num_gpu_batches
        phase.seconds = max(phase.seconds, steps * costs.start().seconds)
    return phase


def _overlapped(
    costs: Costs, around: tuple[PlacedLayer, PlacedLayer, PlacedLayer], tokens: int, context: float
) -> Phase:
    """The steps of one layer, all batches."""
    before, layer, after = around
    count, phase = costs.settings.num_gpu_batches, Phase()
    computing = [costs.start(), *costs.compute(layer, tokens, context), *costs.move_hidden(tokens)]
    store_before, store_own = (costs.store_cache(la.kind, tokens) for la in (before, layer))
    load_own, load_after = (costs.load_cache(la.kind, context) for la in (layer, after))
    weights = costs.load_weights(after)
    if count == 1:
        phase.add([*weights, *load_after, *computing, *store_before])
        return phase
    phase.add([*weights, *load_own, *computing, *store_before])
    phase.add([*load_own, *computing, *store_own], count - 2)
    phase.add([*load_after, *computing, *store_own])
    return phase


def _serial(costs: Costs, layer: PlacedLayer, tokens: int, context: float) -> Phase:
    """The same one after the other."""
    phase, count = Phase(), costs.settings.num_gpu_batches
    phase.add(costs.load_weights(layer))
    phase.add(costs.load_cache(layer.kind, context), count)
    phase.add([*costs.compute(layer, tokens, context), *costs.move_hidden(tokens)], count)
    phase.add(costs.store_cache(layer.kind, tokens), count)
    return phase
