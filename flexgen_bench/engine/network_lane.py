"""Lanes between ranks: what is received takes time from when it has been sent, what is sent is there when that is
over."""

from __future__ import annotations

import time

from flexgen_bench.core.tiers import LaneKind
from flexgen_bench.engine.lane import LaneWorker, QueuedStep


class ReceivingLane(LaneWorker):
    """Waiting for another rank is no work of this lane: a step begins when what it receives is there."""

    def run(self, task: QueuedStep, was_waiting: bool) -> None:
        task.action(task.step)
        begin = end = time.perf_counter()
        if self._throttle is not None:
            begin, end = self._throttle.hold(self._throttle.begin(task.step.bytes, was_waiting=False))
        self.account(task.step, begin, end)


class SendingLane(LaneWorker):
    """Over an emulated network, the other rank has what is sent once it would have been moved."""

    def run(self, task: QueuedStep, was_waiting: bool) -> None:
        begin = time.perf_counter()
        if self._throttle is not None:
            begin, _ = self._throttle.hold(self._throttle.begin(task.step.bytes, was_waiting))
        task.action(task.step)
        self.account(task.step, begin, time.perf_counter())


WORKERS: dict[LaneKind, type[LaneWorker]] = {
    LaneKind.NET_IN: ReceivingLane,
    LaneKind.NET_TOKENS: ReceivingLane,
    LaneKind.NET_OUT: SendingLane,
}
