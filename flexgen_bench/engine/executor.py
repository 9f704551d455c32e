"""Runs steps on lanes: each lane in order, each step as soon as what it waits for is done.

A host lane is a thread. A stream lane (CUDA) is a thread that issues work to a stream: waits between stream lanes are
events on the device, and only a host lane that needs a stream's result waits for it. With ``overlap`` off, every
step runs to its end before the next one is taken: the same steps, no concurrency.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from flexgen_bench.core.tiers import Lane
from flexgen_bench.schedule.dependencies import DependencyTracker
from flexgen_bench.schedule.steps import Step

Action = Callable[[Step], None]


@dataclass
class LaneUse:
    """What a lane did: steps, seconds it worked, bytes its steps moved."""

    steps: int = 0
    busy_s: float = 0.0
    bytes: int = 0


@dataclass(frozen=True)
class LaneSettings:
    """How a lane runs. threads: torch threads of its own; bytes_per_s: throttle of an emulated link;
    stream: the CUDA stream it issues to."""

    threads: int = 1
    bytes_per_s: float | None = None
    stream: torch.cuda.Stream | None = None


class Aborted(RuntimeError):
    """Raised inside a lane when another one has failed."""


class Failure:
    """The first error of any lane, shared by all of them."""

    def __init__(self) -> None:
        self.error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """A step with its number on its lane, and the steps of other lanes that must be done first."""

    step: Step
    number: int
    waits: list[tuple[LaneWorker, int]]
    action: Action


class LaneWorker:
    """One lane: its inbox, its thread, and how far it has come."""

    def __init__(self, lane: Lane, settings: LaneSettings, failure: Failure) -> None:
        self.lane = lane
        self.use = LaneUse()
        self._settings = settings
        self._failure = failure
        self._inbox: SimpleQueue[Task | None] = SimpleQueue()
        self._done = 0  # steps finished (stream lanes: issued)
        # Guards _done; whoever needs a step of this lane waits on it.
        self._progress = threading.Condition()
        self._events: dict[int, tuple[torch.cuda.Event, torch.cuda.Event, int]] = {}
        self._free_at = 0.0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._loop, name=f"lane-{self.lane}", daemon=True)
        self._thread.start()

    def put(self, task: Task) -> None:
        self._inbox.put(task)

    def end(self) -> None:
        """End the thread after what is in its inbox, or at once if a lane has failed."""
        self._inbox.put(None)
        self.wake()

    def wake(self) -> None:
        """Let everybody who waits for this lane look at the failure."""
        with self._progress:
            self._progress.notify_all()

    def wait(self, number: int) -> None:
        """Block the calling thread until the lane's ``number``-th step has really finished."""
        self._wait_done(number)
        pair = self._events.get(number)  # a pair that has been collected is over
        if pair is not None:
            pair[1].synchronize()

    def join(self) -> None:
        """Until the thread, and the device with what it was given, has come to an end."""
        if self._thread is not None:
            self._thread.join()
        if self._settings.stream is not None:
            self._settings.stream.synchronize()

    def run(self, step: Step, number: int, action: Action) -> None:
        """One step, timed; on a throttled link it takes at least bytes / bandwidth."""
        stream = self._settings.stream
        with torch.inference_mode():
            if stream is not None:
                with torch.cuda.stream(stream):
                    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    started.record(stream)
                    action(step)
                    ended.record(stream)
                self._events[number] = (started, ended, step.bytes)
                return
            begin = time.perf_counter()
            action(step)
        if self._settings.bytes_per_s and step.bytes:
            self._free_at = max(self._free_at, begin) + step.bytes / self._settings.bytes_per_s
            time.sleep(max(0.0, self._free_at - time.perf_counter()))
        self.use.steps += 1
        self.use.busy_s += time.perf_counter() - begin
        self.use.bytes += step.bytes

    def collect(self) -> None:
        """Stream lanes: add the events that are over to the lane's use, and forget them."""
        for number, (started, ended, count) in list(self._events.items()):
            if number <= self._done and ended.query():
                self.use.steps += 1
                self.use.busy_s += started.elapsed_time(ended) / 1000
                self.use.bytes += count
                del self._events[number]

    def finish(self, number: int) -> None:
        with self._progress:
            self._done = number
            self._progress.notify_all()

    def _loop(self) -> None:
        try:
            torch.get_num_threads()  # torch takes its own default on a thread's first use: have that first
            torch.set_num_threads(self._settings.threads)
            while (task := self._inbox.get()) is not None and self._failure.error is None:
                for other, number in task.waits:
                    self._wait_for(other, number)
                self.run(task.step, task.number, task.action)
                self.finish(task.number)
        except Aborted:
            pass
        except BaseException as error:  # handed to the caller by Executor
            self._failure.error = self._failure.error or error
        finally:
            self.wake()  # whoever waits for this lane must learn that it has ended

    def _wait_for(self, other: LaneWorker, number: int) -> None:
        """Device to device: an event on this lane's stream. Otherwise the thread waits."""
        mine, theirs = self._settings.stream, other._settings.stream
        if mine is None or theirs is None:
            other.wait(number)
            return
        other._wait_done(number)
        event = other._events.get(number)
        if event is not None:  # collected events have long finished
            mine.wait_event(event[1])

    def _wait_done(self, number: int) -> None:
        if self._done >= number:
            return
        with self._progress:
            while self._done < number:
                if self._failure.error is not None:
                    raise Aborted
                self._progress.wait()


class Executor:
    """Takes steps in program order and keeps every lane as busy as the dependencies allow."""

    def __init__(self, lanes: Mapping[Lane, LaneSettings], overlap: bool = True) -> None:
        self._failure = Failure()
        self._overlap = overlap
        self._tracker = DependencyTracker()
        self._workers = {
            lane: LaneWorker(lane, settings, self._failure) for lane, settings in lanes.items()
        }
        self._last: dict[Lane, int] = {}
        for worker in self._workers.values():
            worker.start()

    def submit(self, step: Step, action: Action) -> tuple[Lane, int]:
        """Queue one step; returns its ticket for ``wait``. Raises what a lane has failed with."""
        if self._failure.error is not None:
            raise self._failure.error
        number, waits = self._tracker.add(step)
        worker = self._workers[step.lane]
        self._last[step.lane] = number
        others = [(self._workers[lane], n) for lane, n in waits.items()]
        worker.put(Task(step, number, others, action))
        if not self._overlap:
            self.wait([(step.lane, number)])
        return step.lane, number

    def wait(self, tickets: Iterable[tuple[Lane, int]]) -> None:
        """Block until these steps are done; raises what a lane has failed with."""
        try:
            for lane, number in tickets:
                self._workers[lane].wait(number)
        except Aborted:
            raise (self._failure.error or Aborted()) from None

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
        self._failure.error = self._failure.error or Aborted("stopped from outside")
        self.close()

    def close(self) -> None:
        """End the lanes after what they were given, or at once after a failure."""
        for worker in self._workers.values():
            worker.end()
        for worker in self._workers.values():
            worker.join()

    def use(self) -> dict[Lane, LaneUse]:
        """What every lane did so far."""
        return {lane: worker.use for lane, worker in self._workers.items()}
