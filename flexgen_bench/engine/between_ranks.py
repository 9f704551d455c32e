"""Steps between ranks: hidden states that come in and go out, and what the last rank has chosen.

R rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.arenas import Arenas
from flexgen_bench.engine.chosen_payload import decoded, encoded
from flexgen_bench.engine.device import Device, crossing
from flexgen_bench.engine.hidden import HiddenStates
from flexgen_bench.engine.nan_checks import Health, Watched
from flexgen_bench.engine.next_tokens import NextTokens, Reader
from flexgen_bench.engine.wire import Wire
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.schedule.steps import Step, StepKind


class Leaving(NamedTuple):
    """Hidden states (R, hidden) on their way to the next rank, and what tells whether all that the layers here have
    made is finite; sums: of all that is watched, once somebody may look at them."""

    rows: Tensor
    watched: list[Watched]
    sums: Tensor | None = None


class BetweenRanks:
    """Everything here is kept by the staging buffer of its micro-batch, until it is used for the last time. wire: to
    the other ranks; reader: who wants the tokens; next_tokens: of the last rank, where they are chosen."""

    def __init__(
        self,
        plan: MemoryPlan,
        wire: Wire,
        dtype: torch.dtype,
        device: Device,
        arenas: Arenas,
        hidden: HiddenStates,
        health: Health,
        reader: Reader,
        next_tokens: NextTokens,
    ) -> None:
        self._wire, self._dtype, self._device = wire, dtype, device
        self._hidden, self._health = hidden, health
        self._reader, self._next = reader, next_tokens
        self._row_bytes = plan.job.hidden_row_bytes
        # The outbox is made of what leaves, and is free when the wire has let go of it.
        arenas.note(Tier.CPU, "outbox", plan.staging.outbox)
        wire.begin(plan.staging.outbox)
        size, count = plan.staging.inbox, plan.staging.num_buffers + plan.staging.cpu_attention_buffers
        self._inbox = [arenas.allocate(Tier.CPU, "inbox", size) for _ in range(count if size else 0)]
        self._arrived: dict[int, Tensor] = {}
        self._leaving: dict[int, Leaving] = {}
        self._outbox: dict[int, Leaving] = {}

    @property
    def actions(self) -> dict[StepKind, Callable[[Step], None]]:
        return {
            StepKind.RECV_HIDDEN: self.recv_hidden,
            StepKind.MOVE_RECEIVED: self.move_received,
            StepKind.ENTER: self.enter,
            StepKind.LEAVE: self.leave,
            StepKind.MOVE_LEAVING: self.move_leaving,
            StepKind.SEND_HIDDEN: self.send_hidden,
            StepKind.SEND_TOKENS: self.send_tokens,
            StepKind.RECV_TOKENS: self.recv_tokens,
        }

    def clear(self) -> None:
        """Let go of everything: the job is over."""
        for held in (self._inbox, self._arrived, self._leaving, self._outbox):
            held.clear()

    # In

    def recv_hidden(self, step: Step) -> None:
        """RECV_HIDDEN: of the rank before, into the inbox."""
        self._wire.recv_hidden(step.micro_batch_index, self._received(step))

    def move_received(self, step: Step) -> None:
        """MOVE_RECEIVED: to the accelerator."""
        self._arrived[step.buffer_index] = self._device.to_compute(self._received(step))

    def enter(self, step: Step) -> None:
        """ENTER: the same as hidden states, as if the layer before had made them here."""
        moved = self._arrived.pop(step.buffer_index, None)
        # The inbox is filled again while these are still needed.
        self._hidden.enter(step, self._received(step).clone() if moved is None else crossing(moved))

    def recv_tokens(self, step: Step) -> None:
        """RECV_TOKENS: tell the sequences what the last rank has chosen."""
        self._reader.take(step.micro_batch, decoded(self._wire.recv_tokens(step.micro_batch_index)))

    def _received(self, step: Step) -> Tensor:
        raw = self._inbox[step.buffer_index][: step.micro_batch.rows * self._row_bytes]
        return raw.view(self._dtype).view(step.micro_batch.rows, -1)

    # Out

    def leave(self, step: Step) -> None:
        """LEAVE: what the last layer here has made, for the next rank."""
        x, watched = self._hidden.made(step), self._health.gather(step)
        if step.lane.of_accelerator:
            self._leaving[step.buffer_index] = Leaving(x, watched)
        else:  # where it lies, or is staged, is used again while it is under way
            self._outbox[step.buffer_index] = Leaving(x.clone(), watched, _sums(watched))

    def move_leaving(self, step: Step) -> None:
        """MOVE_LEAVING: to the host, with the sums."""
        rows, watched, _ = self._leaving.pop(step.buffer_index)
        sums = _sums(watched)
        on_host = None if sums is None else self._device.to_host(sums)
        self._outbox[step.buffer_index] = Leaving(self._device.to_host(rows), watched, on_host)

    def send_hidden(self, step: Step) -> None:
        """SEND_HIDDEN: to the next rank. What is not finite goes no further."""
        rows, watched, sums = self._outbox.pop(step.buffer_index)
        if sums is not None:
            self._health.judge(sums, watched)
        self._wire.send_hidden(step.micro_batch_index, rows)

    def send_tokens(self, step: Step) -> None:
        """SEND_TOKENS: to all other ranks, what has been chosen for the micro-batch."""
        self._wire.send_tokens(step.micro_batch_index, encoded(self._next.chosen_for(step.micro_batch)))


def _sums(watched: Sequence[Watched]) -> Tensor | None:
    """All in one piece; None if there are none."""
    return torch.cat([crossing(one.sums) for one in watched]) if watched else None
