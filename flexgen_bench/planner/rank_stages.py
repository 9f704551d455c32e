"""Which rank of a pipeline computes which layers.

A pass goes through all ranks, so the slowest one sets the pace. Ranks of like machines have as many layers each as can
be. Otherwise every further layer goes to the rank that is done with it first, which for costs that grow with the layers
is best: seconds of a block's life on what is known of a machine, or else the part of its memory that is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from flexgen_bench.core.device_memory import job_bytes
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.pipeline import Stage, even_stages, stages_of
from flexgen_bench.core.rates import SiteRates, number_format
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.models.model import Model
from flexgen_bench.planner.rank_machines import RankMachine
from flexgen_bench.schedule.scheduled_job import UnitKind
from flexgen_bench.schedule.sequence_groups import Request

BLOCK = 64  # sequences that share a load of the weights: what a block is taken to be before there is a policy
_UNKNOWN = 1.0  # bytes of memory where nobody knows any: then only the numbers of layers are compared

# Of a number of layers, what a rank has to bear with them.
_Burden = Callable[[int], float]


def divided(model: Model, machines: Sequence[RankMachine], request: Request) -> tuple[Stage, ...]:
    """The layers of a model over these ranks. request: what each sequence asks. UserError for more ranks than
    layers."""
    layers, ranks = model.shape.num_layers, len(machines)
    even = even_stages(layers, ranks)
    if all(machine.hardware == machines[0].hardware for machine in machines):
        return even
    burdens = _burdens(model, [machine.hardware for machine in machines], request)
    counts = [1] * ranks
    for _ in range(layers - ranks):
        rank = min(range(ranks), key=lambda one: burdens[one](counts[one] + 1))
        counts[rank] += 1
    return stages_of(counts, layers)


def _burdens(model: Model, hardware: Sequence[HardwareProfile], request: Request) -> list[_Burden]:
    units = model.packed.units
    layers = [unit for unit in units if unit.kind is UnitKind.LAYER]
    layer_bytes = sum(unit.home_bytes for unit in layers) / len(layers)
    last = len(hardware) - 1
    # The first rank has the embedding beside its layers, the last one the head, tied or not.
    beside = [units[0].home_bytes if rank == 0 else 0 for rank in range(last + 1)]
    beside[last] += model.packed.head.num_bytes

    def filled(rank: int) -> _Burden:
        memory = _memory(hardware[rank]) or _UNKNOWN
        return lambda count: (count * layer_bytes + beside[rank]) / memory

    if any(one.rates is None for one in hardware):
        if len({_memory(one) is None for one in hardware}) > 1:
            raise UserError(
                "gpu.gpu_memory",
                [_memory(one) for one in hardware],
                "known of all ranks, or of none",
                "State it for each, or say how many layers each rank has with gpu.layers_per_rank.",
            )
        return [filled(rank) for rank in range(last + 1)]
    costs = [_LifeCost(model, one, request, layer_bytes) for one in hardware]
    return [partial(cost.seconds, more) for cost, more in zip(costs, beside, strict=True)]


class _LifeCost:
    """Seconds of a block's life on a machine: its prompts, bound by arithmetic, and a pass for each token, bound by
    what of the weights is read where they lie and what is brought there."""

    def __init__(self, model: Model, hardware: HardwareProfile, request: Request, layer_bytes: float) -> None:
        site = _rates(hardware)
        layer = next(unit for unit in model.packed.units if unit.kind is UnitKind.LAYER)
        flops, number = model.decoder.layers[0].flops(layer.num_values), number_format(model.dtype)
        width = (layer.num_values / 12) ** 0.5  # as in cost.py

        def product_s(rows: int) -> float:
            return sum(flops) * rows / site.matrix_rate(number, rows, width)

        self._passes = request.gen_len
        self._layer_bytes, self._memory = layer_bytes, site.memory
        self._prefill_s, self._decode_s = product_s(BLOCK * request.prompt_len), product_s(BLOCK)
        self._room = _memory(hardware) or float("inf")
        link = Lane.H2D if hardware.compute_tier is Tier.GPU else Lane.DISK_READ
        self._link = hardware.link_rate(link) or float("inf")

    def seconds(self, beside: float, layers: int) -> float:
        there = layers * self._layer_bytes + beside
        moved_s = max(0.0, there - self._room) / self._link
        pass_s = max(layers * self._decode_s, there / self._memory, moved_s)
        return max(layers * self._prefill_s, moved_s) + self._passes * pass_s


def _rates(hardware: HardwareProfile) -> SiteRates:
    assert hardware.rates is not None, "known of all ranks"
    return hardware.rates.sites[hardware.compute_tier]


def _memory(hardware: HardwareProfile) -> int | None:
    """Of what computes, for a plan."""
    return job_bytes(hardware) or hardware.capacity_bytes(hardware.compute_tier)
