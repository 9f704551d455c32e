"""One lane: a thread that carries out its steps in order, each when what it waits for is done."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from flexgen_bench.core.tiers import Lane
from flexgen_bench.engine.progress import Aborted, Failure, Progress
from flexgen_bench.engine.step_errors import explain
from flexgen_bench.engine.throttle import Link, Throttle
from flexgen_bench.engine.timeline import LaneLog
from flexgen_bench.schedule.steps import Step, StepKind

Action = Callable[[Step], None]


def as_it_is(step: Step) -> Step:
    """Of a step whose bytes were known when it was made."""
    return step


@dataclass
class LaneUse:
    """What a lane did: steps, seconds it worked, bytes its steps moved."""

    steps: int = 0
    busy_s: float = 0.0
    bytes: int = 0


@dataclass(frozen=True)
class LaneSettings:
    """How a lane runs. threads: torch threads of its own; link: the emulated link it works on, which other lanes may
    share; stream: the CUDA stream it issues to."""

    threads: int = 1
    link: Link | None = None
    stream: torch.cuda.Stream | None = None

    @property
    def bytes_per_s(self) -> float | None:
        """The bandwidth of the emulated link; None if the lane is not throttled."""
        return None if self.link is None else self.link.bytes_per_s


@dataclass(slots=True)
class QueuedStep:
    """A step with its number on its lane, and the steps of other lanes that must be done first."""

    step: Step
    number: int
    waits: list[tuple[LaneWorker, int]]
    action: Action


class LaneWorker:
    """One lane on the host: its inbox, its thread, how far it has come, and what it did."""

    def __init__(
        self,
        lane: Lane,
        settings: LaneSettings,
        failure: Failure,
        log: LaneLog,
        settle: Callable[[Step], Step] = as_it_is,
    ) -> None:
        self.lane, self.settings, self.log, self._settle = lane, settings, log, settle
        self.use = LaneUse()
        self.progress = Progress(failure)  # steps finished (on a stream: issued)
        self._failure = failure
        self._throttle = None if settings.link is None else Throttle(settings.link)
        self._inbox: SimpleQueue[QueuedStep | None] = SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=f"lane-{lane}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, task: QueuedStep) -> None:
        self._inbox.put(task)

    def end(self) -> None:
        """End the thread after what is in its inbox, or at once if a lane has failed."""
        self._inbox.put(None)
        self.progress.wake_all()

    def join(self) -> None:
        """Until the thread has come to an end, or at once if it never began.

        An interrupt of the waiting thread is raised then, and not before: what the running step uses may be released
        after this. (An interrupted ``Thread.join`` takes the thread for ended, up to Python 3.12.)
        """
        interrupt: KeyboardInterrupt | None = None
        while self._thread.ident is not None and not self._ended.is_set():
            try:
                self._ended.wait()
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
        if self._thread.ident is not None:
            self._thread.join()

    def wait(self, number: int) -> bool:
        """Block the calling thread until the ``number``-th step has really finished; whether that took waiting."""
        return self.progress.wait(number)

    def wait_for(self, other: LaneWorker, number: int) -> bool:
        """Let this lane's next step begin after a step of another lane; whether that took waiting."""
        return other.wait(number)

    def run(self, task: QueuedStep, was_waiting: bool) -> None:
        """One step, timed. was_waiting: it could have begun as soon as the lane was free."""
        step = task.step
        if self._throttle is not None:
            transfer = self._throttle.begin(step.bytes, was_waiting)
            task.action(step)
            begin, end = self._throttle.hold(transfer)
        else:
            begin = time.perf_counter()
            task.action(step)
            end = time.perf_counter()
        self.account(step, begin, end)

    def collect(self) -> None:
        """Account for what has ended since; a lane on the host does so at once."""

    def settle(self) -> None:
        """Once the thread has ended: until nothing that it was given is running elsewhere."""

    def account(self, step: Step, begin_s: float, end_s: float) -> None:
        """Add a step that is over, with its times on the host's clock."""
        use = self.use
        use.steps += 1
        use.busy_s += end_s - begin_s
        use.bytes += step.bytes
        self.log.add(step, begin_s, end_s)

    def _loop(self) -> None:
        try:
            torch.get_num_threads()  # torch takes its own default on a thread's first use: have that first
            torch.set_num_threads(self.settings.threads)
            # Entered once for all steps: each of these costs more than the rest of a step's overhead.
            with torch.inference_mode(), self._context():
                self._work()
        except Aborted:
            pass
        except BaseException as error:  # handed to the caller by Executor
            self._failure.set(error)
        finally:
            self.progress.wake_all()  # whoever waits for this lane must learn that it has ended
            self._ended.set()

    def _context(self) -> contextlib.AbstractContextManager[object]:
        """What the thread is in while it works."""
        return contextlib.nullcontext()

    def _work(self) -> None:
        while True:
            was_waiting = not self._inbox.empty()
            task = self._inbox.get()
            if task is None or self._failure.error is not None:
                return
            for other, number in task.waits:
                if self.wait_for(other, number):
                    was_waiting = False
            try:
                if task.step.kind is StepKind.LOAD_EXPERTS:
                    task.step = self._settle(task.step)
                self.run(task, was_waiting)
            except BaseException as error:
                if error is not self._failure.error:  # else it is another lane's, which has ended this one's wait
                    explain(error, task.step)
                raise
            self.progress.reach(task.number)
