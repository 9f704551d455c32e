"""Attention sinks of all layers, where attention is computed.

They are weights of their layer, a value for each query head. A layer's weights may be on the accelerator alone, or in a
staging buffer that is used again, when the cpu attends for it: so every site that attends keeps those of all layers, in
float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexgen_bench.core.tiers import LaneKind, Tier
from flexgen_bench.engine.arenas import Arenas
from flexgen_bench.models.packing import PackedEntry, PackedModel
from flexgen_bench.schedule.scheduled_job import ScheduledJob
from flexgen_bench.schedule.steps import Step


class Sinks:
    """read: a plain tensor of the packed file, in host memory. Allocates what the plan calls attention sinks."""

    def __init__(
        self, packed: PackedModel, job: ScheduledJob, read: Callable[[PackedEntry], Tensor], arenas: Arenas
    ) -> None:
        self._of: dict[tuple[int, Tier], Tensor] = {}
        here = [packed.units[unit.index] for unit in job.own]
        places = [(unit, site.tier) for unit in here for site in job.attends_at(job.units[unit.index])]
        for tier in {tier for _, tier in places}:
            units = [unit for unit, one in places if one is tier and unit.sinks is not None]
            if units:
                memory = arenas.allocate(tier, "attention sinks", sum(unit.sink_bytes for unit in units))
                for unit in units:
                    assert unit.sinks is not None
                    own, memory = memory[: unit.sink_bytes].view(torch.float32), memory[unit.sink_bytes :]
                    self._of[unit.index, tier] = own.copy_(read(unit.sinks))

    def of(self, step: Step) -> Tensor | None:
        """(H,) float32, where the step attends; None: its layer has none."""
        if not self._of:
            return None
        return self._of.get((step.unit, Tier.GPU if step.lane.kind is LaneKind.GPU else Tier.CPU))
