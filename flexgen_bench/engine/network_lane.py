"""Lanes between ranks: what is sent is there when that is over, and has been received by then, unless that takes
longer. So a message takes the time of the slower of both ends, as the simulator has it (``planner/cost.py``)."""

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


def receiving_rate(net_in: float, net_out: float | None) -> float | None:
    """Bytes/s, counted from when a message has been sent, until an emulated network has delivered it; None: it is there
    then. net_in, net_out: of a rank, and of those that send to it (None: not throttled)."""
    more_s = 1 / net_in - (0.0 if net_out is None else 1 / net_out)
    return 1 / more_s if more_s > 0 else None


WORKERS: dict[LaneKind, type[LaneWorker]] = {
    LaneKind.NET_IN: ReceivingLane,
    LaneKind.NET_TOKENS: ReceivingLane,
    LaneKind.NET_OUT: SendingLane,
}
