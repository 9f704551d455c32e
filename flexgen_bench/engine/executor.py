"""Runs steps on lanes: each lane in order, each step as soon as what it waits for is done.

A host lane is a thread (``lane.py``), a stream lane a thread that issues work to a CUDA stream (``stream_lane.py``).
With ``overlap`` off, every step runs to its end before the next one is taken: the same steps, no concurrency. Which
lanes there are says whoever makes an executor; of how many devices does not matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

from flexgen_bench.core.errors import OutOfMemory
from flexgen_bench.core.tiers import Lane
from flexgen_bench.core.timeline import Timeline
from flexgen_bench.engine.lane import Action, LaneSettings, LaneUse, LaneWorker, QueuedStep, as_it_is
from flexgen_bench.engine.network_lane import WORKERS
from flexgen_bench.engine.progress import Aborted, Failure
from flexgen_bench.engine.stream_lane import Origin, StreamWorker
from flexgen_bench.engine.timeline import LaneLog, StepBudget
from flexgen_bench.schedule.dependencies import DependencyTracker
from flexgen_bench.schedule.steps import Step

__all__ = ["Executor", "LaneSettings", "LaneUse"]


class Executor:
    """Takes steps in program order and keeps every lane as busy as the dependencies allow."""

    def __init__(
        self,
        lanes: Mapping[Lane, LaneSettings],
        overlap: bool = True,
        settle: Callable[[Step], Step] = as_it_is,
        tell: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """settle: what a step of touched experts really is, once it may begin. tell: of the first failure (see
        ``Failure``)."""
        self._failure, self._settle = Failure(tell), settle
        self._overlap = overlap
        self._tracker = DependencyTracker()
        self._workers = self._make(lanes)
        self._last: dict[Lane, int] = {}
        self._begin_s = time.perf_counter()
        try:
            for worker in self._workers.values():
                worker.start()
        except RuntimeError as error:  # the system refuses another thread
            self.abort()
            raise OutOfMemory(
                "cpu",
                "starting the lanes",
                str(error),
                "free it, or raise the limits on memory and processes (ulimit -v, ulimit -u).",
            ) from error

    def submit(self, step: Step, action: Action) -> tuple[Lane, int]:
        """Queue one step; returns its ticket for ``wait``. Raises what a lane has failed with."""
        if self._failure.error is not None:
            raise self._failure.error
        lane = step.lane
        number, waits = self._tracker.add(step)
        workers = self._workers
        others = [(workers[other], n) for other, n in waits.items()]
        workers[lane].put(QueuedStep(step, number, others, action))
        self._last[lane] = number
        if not self._overlap:
            self.wait([(lane, number)])
        return lane, number

    def wait(self, tickets: Iterable[tuple[Lane, int]]) -> None:
        """Block until these steps are done; raises what a lane has failed with."""
        try:
            for lane, number in tickets:
                self._workers[lane].wait(number)
        except Aborted as aborted:
            error = self._failure.error or aborted
            raise error from error.__cause__  # it has a cause of its own: that another lane ended is none

    def drain(self) -> None:
        """Block until everything submitted is done."""
        self.wait(list(self._last.items()))
        self.collect()

    def collect(self) -> None:
        """Account for what streams have finished, so that events do not pile up."""
        for worker in self._workers.values():
            worker.collect()

    def abort(self) -> None:
        """Drop what has not begun and block until no step is running: what steps use may be released then."""
        self._failure.set(Aborted("stopped from outside"))
        self.close()

    def close(self) -> None:
        """End the lanes after what they were given, or at once after a failure.

        Raises what the device has failed with, unless a lane has already told of a failure.
        """
        for worker in self._workers.values():
            worker.end()
        with ExitStack() as joined:  # all of them, even if waiting for one is interrupted
            for worker in self._workers.values():
                joined.callback(worker.join)
        for worker in self._workers.values():
            try:
                worker.settle()
            except RuntimeError as error:  # a CUDA error stays: every later call fails with it, too
                if self._failure.error is None:
                    raise
                self._failure.error.add_note(f"lane {worker.lane} ended with: {error}")

    def use(self) -> dict[Lane, LaneUse]:
        """What every lane did so far."""
        return {lane: worker.use for lane, worker in self._workers.items()}

    def timeline(self) -> Timeline:
        """What every lane did and when; times count from the making of this executor. Complete after ``drain``."""
        return Timeline(
            {
                str(lane): worker.log.timeline(self._begin_s, worker.settings.bytes_per_s)
                for lane, worker in self._workers.items()
            }
        )

    def _make(self, lanes: Mapping[Lane, LaneSettings]) -> dict[Lane, LaneWorker]:
        budget, origin = StepBudget(), None
        workers: dict[Lane, LaneWorker] = {}
        for lane, settings in lanes.items():
            log = LaneLog(budget)
            if settings.stream is None:
                kind = WORKERS.get(lane.kind, LaneWorker)
                workers[lane] = kind(lane, settings, self._failure, log, self._settle)
                continue
            origin = origin or Origin.record(settings.stream)  # one for all: the device has one clock
            workers[lane] = StreamWorker(lane, settings, self._failure, log, settings.stream, origin, self._settle)
        return workers
