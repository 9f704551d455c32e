"""Policies that differ from one in a single choice: the neighbourhood in which a search improves what it has found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.policy import AttentionSite, ExpertLoads, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.resident_policies import SMALLEST_CHUNK
from flexgen_bench.planner.search_space import SearchSpace

_STEPS = (0.25, 0.05)  # shares that are moved between tiers at once, besides a single layer or sequence
_NOTHING = 1e-9  # a share that rounding leaves: what is on a tier makes it one that is used
_CHUNKS = (None, 8192, 4096, 2048, 1024)
MOST_BUFFERS = 4
# Larger ones gain nothing that shows: weights are paid for by then.
LARGEST_BLOCK, LARGEST_MICRO_BATCH = 1024, 256


def neighbours(space: SearchSpace, policy: Policy) -> Iterator[Policy]:
    """All of them, those that usually bring most first. Some do not fit. None states a moved share of no cache."""
    for other in _changed_once(space, policy):
        is_idle = other.kv_moved and not other.kv_cache.share(Tier.CPU)
        yield replace(other, kv_moved=0.0) if is_idle else other


def _changed_once(space: SearchSpace, policy: Policy) -> Iterator[Policy]:
    yield from _batches(space, policy)
    yield from _sites(space, policy)
    for prefetch in (policy.prefetch - 1, policy.prefetch + 1):
        if 1 <= prefetch <= MOST_BUFFERS:
            yield replace(policy, prefetch=prefetch)
    layers, block = space.num_layers, policy.block_size
    items = {"weights": layers, "kv_cache": block, "activations": block, "experts": layers}
    for kind, placement in policy.placements.items():
        for other in _shifted(space, placement, items[kind]):
            yield replace(policy, **{kind: other})  # type: ignore[arg-type]


def fine_neighbours(space: SearchSpace, policy: Policy) -> Iterator[Policy]:
    """Blocks a little larger or smaller, for when the coarse choices are made: taken earlier they lead away from larger
    steps."""
    most = space.largest_block
    eighth = max(1, policy.gpu_batch_size // 8)
    for size in (policy.gpu_batch_size + eighth, policy.gpu_batch_size - eighth):
        block = size * policy.num_gpu_batches
        if size >= 1 and block <= LARGEST_BLOCK and (most is None or block <= most):
            yield replace(policy, gpu_batch_size=size)


def _batches(space: SearchSpace, policy: Policy) -> Iterator[Policy]:
    """Larger and smaller blocks and micro-batches."""
    most, size, count = space.largest_block, policy.gpu_batch_size, policy.num_gpu_batches
    shapes = [
        (size, count + 1),
        (size, count - 1),
        (2 * size, count),
        (size, 2 * count),
        (2 * size, -(-count // 2)),
        (-(-size // 2), 2 * count),
        (-(-size // 2), count),
    ]
    block = size * count
    shapes += [(-(-block // parts), parts) for parts in (count - 1, count + 1) if parts]
    if most is not None:
        shapes += [(-(-most // parts), parts) for parts in (count, count + 1, max(1, count - 1))]
    for new_size, new_count in dict.fromkeys(shapes):
        block = new_size * new_count
        if block > LARGEST_BLOCK or new_size > LARGEST_MICRO_BATCH:
            continue
        if (new_size, new_count) == (size, count):
            continue
        # A block may have a little room to spare where the job does not divide evenly.
        if new_count >= 1 and (most is None or block < most + new_size):
            yield replace(policy, gpu_batch_size=new_size, num_gpu_batches=new_count)


def _sites(space: SearchSpace, policy: Policy) -> Iterator[Policy]:
    """Another schedule, another place for attention or for layers, another chunk, another compression."""
    job = space.job
    longer_than_block = space.wave_prompts is None or space.wave_prompts > policy.block_size
    if job.gen_len > 1 and longer_than_block:
        yield from (replace(policy, schedule=s) for s in Schedule if s is not policy.schedule)
    if job.hardware.compute_tier is Tier.GPU:
        others = (a for a in AttentionSite if a is not policy.attention)
        yield from (replace(policy, attention=a, kv_moved=0.0) for a in others)
        yield from _divided_otherwise(policy)
        yield from (replace(policy, offloaded=o) for o in Offloaded if o is not policy.offloaded)
    if policy.experts is not None:
        yield from (replace(policy, expert_loads=loads) for loads in ExpertLoads if loads is not policy.expert_loads)
        if policy.experts == policy.weights:
            yield replace(policy, experts=None, expert_loads=ExpertLoads.ALL)
    tokens = policy.gpu_batch_size * job.prompt_len
    for chunk in _chunks(policy.prefill_chunk):
        if chunk != policy.prefill_chunk and (chunk is None or chunk < tokens):
            yield replace(policy, prefill_chunk=chunk)
    for lossy in space.lossies:
        if lossy != policy.lossy:
            yield replace(policy, lossy=lossy)


def _divided_otherwise(policy: Policy) -> Iterator[Policy]:
    """Of a divided cache more or less moved. Others are divided by a step of the search of its own."""
    if policy.kv_moved:
        shares = (policy.kv_moved + sign * step for step in _STEPS for sign in (1, -1))
        yield from (replace(policy, kv_moved=round(share, 6)) for share in shares if 0 <= share < 1)


def _chunks(chunk: int | None) -> Iterator[int | None]:
    """Other chunks; of small ones half and twice as much, too, as they are where memory is tight."""
    yield from _CHUNKS
    if chunk is not None and chunk < 2 * min(filter(None, _CHUNKS)):
        yield 2 * chunk
        if chunk >= 2 * SMALLEST_CHUNK:
            yield chunk // 2


def _shifted(space: SearchSpace, placement: Placement, items: int) -> Iterator[Placement]:
    """A part of what is on one tier moved to another."""
    for source, target in permutations(space.job.hardware.tiers, 2):
        held = placement.share(source)
        for step in dict.fromkeys((1.0, *_STEPS, 1 / items)):
            moved = min(step, held)
            if moved > _NOTHING and (step <= held or step == 1.0):
                shares = to_json(placement)
                left = held - moved
                shares[source] = left if left > _NOTHING else 0.0
                shares[target] += moved
                total = sum(shares.values())
                yield Placement(**{tier: share / total for tier, share in shares.items()})
