"""Steps of layers that several ranks share: what this rank has made, what all have together, and what follows from it.

R rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.arenas import Arenas
from flexgen_bench.engine.device import Device, crossing
from flexgen_bench.engine.hidden import HiddenStates
from flexgen_bench.engine.layers import Layers
from flexgen_bench.engine.wire import Wire
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.schedule.steps import Step, StepKind


class Reductions:
    """Everything here is kept by the staging buffer of its micro-batch, until it is used for the last time. wire: to
    the ranks that share every layer with this one."""

    def __init__(
        self,
        plan: MemoryPlan,
        wire: Wire,
        dtype: torch.dtype,
        device: Device,
        arenas: Arenas,
        hidden: HiddenStates,
        layers: Layers,
    ) -> None:
        self._job, self._wire, self._dtype, self._device = plan.job, wire, dtype, device
        self._hidden, self._layers = hidden, layers
        self._row_bytes = plan.job.hidden_row_bytes
        count = plan.staging.num_buffers + plan.staging.cpu_attention_buffers
        self._sums = [arenas.allocate(Tier.CPU, "sums", plan.staging.sums) for _ in range(count)]
        self._x: dict[int, Tensor] = {}  # the residual stream
        self._partial: dict[int, Tensor] = {}  # on the accelerator
        self._reduced: dict[int, Tensor] = {}

    @property
    def actions(self) -> dict[StepKind, Callable[[Step], None]]:
        return {
            StepKind.MOVE_PARTIAL: self.move_partial,
            StepKind.REDUCE: self.reduce,
            StepKind.MOVE_REDUCED: self.move_reduced,
            StepKind.MLP: self.mlp,
            StepKind.ADD: self.add,
        }

    def clear(self) -> None:
        """Let go of everything: the job is over."""
        for held in (self._sums, self._x, self._partial, self._reduced):
            held.clear()

    def output(self, step: Step, x: Tensor, attended: Tensor) -> None:
        """OUTPUT: hidden states before the layer (R, hidden) and attention output (R, H * D) of this rank's heads."""
        self._x[step.buffer_index] = x
        self._leave(step, self._layers.slice_of(step).output(x, attended))

    def move_partial(self, step: Step) -> None:
        """MOVE_PARTIAL: to the host."""
        self._sum(step).copy_(crossing(self._partial.pop(step.buffer_index)), non_blocking=True)

    def reduce(self, step: Step) -> None:
        """REDUCE: with what the other ranks have made."""
        self._wire.all_reduce(step.micro_batch_index, self._sum(step))

    def move_reduced(self, step: Step) -> None:
        """MOVE_REDUCED: to the accelerator."""
        self._reduced[step.buffer_index] = self._device.to_compute(self._sum(step))

    def mlp(self, step: Step) -> None:
        """MLP: from the sum behind the attention to a part of the next one."""
        key = step.buffer_index
        self._x[key], made = self._layers.slice_of(step).mlp(self._x.pop(key), self._summed(step))
        self._leave(step, made)

    def add(self, step: Step) -> None:
        """ADD: the last sum, to the residual stream."""
        x = self._x.pop(step.buffer_index)
        self._hidden.put(step, self._layers.slice_of(step).add(x, self._summed(step)))

    def _leave(self, step: Step, made: Tensor) -> None:
        if step.lane.of_accelerator:
            self._partial[step.buffer_index] = made
        else:
            self._sum(step).copy_(made)

    def _summed(self, step: Step) -> Tensor:
        """What all ranks have made, where the step computes."""
        return crossing(self._reduced.pop(step.buffer_index)) if step.lane.of_accelerator else self._sum(step)

    def _sum(self, step: Step) -> Tensor:
        rows = step.micro_batch.rows
        return self._sums[step.buffer_index][: rows * self._row_bytes].view(self._dtype).view(rows, -1)
