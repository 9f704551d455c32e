"""Steps of experts that are placed apart from their layer, and what passes between its OUTPUT and its hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from flexgen_bench.core.tiers import LaneKind
from flexgen_bench.engine.device import Device, crossing
from flexgen_bench.engine.hidden import HiddenStates
from flexgen_bench.engine.layers import Layers
from flexgen_bench.engine.weights import Weights
from flexgen_bench.kernels import ops
from flexgen_bench.models import formulas
from flexgen_bench.models.parts import Layer
from flexgen_bench.schedule.scheduled_job import ScheduledJob
from flexgen_bench.schedule.steps import Step


class Routed(NamedTuple):
    """What a layer leaves for its experts: see ``formulas.routed``."""

    x: Tensor
    read: Tensor
    chosen: Tensor
    shares: Tensor
    shared: Tensor | None = None


class PlacedExperts:
    """Everything here is kept by the staging buffer of its micro-batch, until it is used for the last time."""

    def __init__(
        self,
        job: ScheduledJob,
        layers: Layers,
        weights: Weights,
        hidden: HiddenStates,
        device: Device,
        decoder_layers: Sequence[Layer],
    ) -> None:
        self._job, self._layers, self._weights = job, layers, weights
        self._hidden, self._device, self._parts = hidden, device, decoder_layers
        self._left: dict[int, Routed] = {}
        self._moved: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # read, chosen, shares
        self._made: dict[int, Tensor] = {}
        self._returned: dict[int, Tensor] = {}

    def leave(self, step: Step, made: Any) -> None:
        """What OUTPUT or LAYER makes: hidden states, or what its experts are to make them of."""
        if self._job.units[step.unit].companion < 0:
            self._hidden.put(step, made)
        else:
            self._left[step.buffer_index] = Routed(*made)

    def settled(self, step: Step) -> Step:
        """LOAD_EXPERTS, with the bytes of the experts that its micro-batch has been routed to. Waits for the routing
        to reach the host."""
        chosen = crossing(self._left[step.buffer_index].chosen)
        return self._weights.settled(step, chosen.unique().tolist())

    def move_routed(self, step: Step) -> None:
        """MOVE_ROUTED."""
        state = self._left[step.buffer_index]
        move = self._mover(step)
        self._moved[step.buffer_index] = move(state.read), move(state.chosen), move(state.shares)

    def compute(self, step: Step) -> None:
        """EXPERTS."""
        experts = self._job.units[step.unit]
        each = self._layers.experts_of(step)
        if self._job.units[experts.companion].site is not experts.site:
            read, chosen, shares = map(crossing, self._moved.pop(step.buffer_index))
            self._made[step.buffer_index] = ops.through_experts(read, chosen, shares, each)
            return
        state = self._left.pop(step.buffer_index)
        made = ops.through_experts(state.read, state.chosen, state.shares, each)
        self._put(step, experts.companion, state, made)

    def move_made(self, step: Step) -> None:
        """MOVE_EXPERTS."""
        self._returned[step.buffer_index] = self._mover(step)(self._made.pop(step.buffer_index))

    def add(self, step: Step) -> None:
        """ADD_EXPERTS."""
        state = self._left.pop(step.buffer_index)
        self._put(step, step.unit, state, crossing(self._returned.pop(step.buffer_index)))

    def clear(self) -> None:
        """Let go of everything."""
        for held in (self._left, self._moved, self._made, self._returned):
            held.clear()

    def _put(self, step: Step, layer: int, state: Routed, made: Tensor) -> None:
        # Without weights: a layer that normalises what its experts make is not taken apart (planner/memory_plan.py).
        self._hidden.put(step, formulas.after_mlp(ops, self._parts[layer - 1], {}, state.x, made, state.shared))

    def _mover(self, step: Step) -> Callable[[Tensor], Tensor]:
        return self._device.to_host if step.lane.kind is LaneKind.D2H else self._device.to_compute
