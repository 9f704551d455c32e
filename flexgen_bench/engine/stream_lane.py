"""A lane on a CUDA stream: its thread issues work and goes on; events on the device say when it is done.

Waits between stream lanes are events on the device. Only a host lane that needs a stream's result waits for it, asleep.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flexgen_bench.core.tiers import Lane
from flexgen_bench.engine.lane import LaneSettings, LaneWorker, QueuedStep, as_it_is
from flexgen_bench.engine.progress import Failure
from flexgen_bench.engine.timeline import LaneLog
from flexgen_bench.schedule.steps import Step

# The driver tells the time between two events as milliseconds in 32 bits: to the microsecond for 8 s, no longer.
_EXACT_MS = 8000.0


@dataclass(frozen=True)
class Origin:
    """An event of the device, and when it happened on the host's clock (seconds)."""

    event: torch.cuda.Event
    time_s: float

    @staticmethod
    def record(stream: torch.cuda.Stream) -> Origin:
        """The present. Waits for what the stream was given before."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        event.synchronize()
        return Origin(event, time.perf_counter())

    def time_of(self, event: torch.cuda.Event) -> float:
        """When an event that is over happened, on the host's clock."""
        return self.time_s + float(self.event.elapsed_time(event)) / 1000


@dataclass(frozen=True, slots=True)
class Issued:
    """A step that the device was given, between two events."""

    step: Step
    started: torch.cuda.Event
    ended: torch.cuda.Event


class EventPairs:
    """Events for steps, used again when what they told is known: making two costs more than recording them.

    Who still waits for an event that is used again waits for a later step of the same stream, which is issued only when
    the ones it needs itself are over or on their way: it waits longer, and not for ever. One thread takes, another one
    gives back.
    """

    def __init__(self) -> None:
        self._free: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def take(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """(started, ended)."""
        try:
            return self._free.pop()
        except IndexError:
            # blocking: threads that wait for it sleep, where the driver would have them spin on cores the cpu lane
            # needs.
            ended = torch.cuda.Event(enable_timing=True, blocking=True)
            return torch.cuda.Event(enable_timing=True), ended

    def give_back(self, started: torch.cuda.Event, ended: torch.cuda.Event) -> None:
        """Both are over, and their times are known."""
        self._free.append((started, ended))


class StreamWorker(LaneWorker):
    """A lane whose steps are done when the device says so; ``progress`` counts what was issued."""

    def __init__(
        self,
        lane: Lane,
        settings: LaneSettings,
        failure: Failure,
        log: LaneLog,
        stream: torch.cuda.Stream,
        origin: Origin,
        settle: Callable[[Step], Step] = as_it_is,
    ) -> None:
        super().__init__(lane, settings, failure, log, settle)
        self._stream, self._origin = stream, origin
        self._issued: dict[int, Issued] = {}  # by number; until they are over and collected
        self._collected = 0
        self._events = EventPairs()

    def wait(self, number: int) -> bool:
        waited = super().wait(number)
        issued = self._issued.get(number)  # what has been collected is over
        if issued is not None and not issued.ended.query():
            issued.ended.synchronize()
            return True
        return waited

    def wait_for(self, other: LaneWorker, number: int) -> bool:
        if not isinstance(other, StreamWorker):
            return super().wait_for(other, number)
        waited = other.progress.wait(number)
        issued = other._issued.get(number)
        if issued is not None:
            self._stream.wait_event(issued.ended)
        return waited

    def run(self, task: QueuedStep, was_waiting: bool) -> None:
        started, ended = self._events.take()
        started.record(self._stream)
        task.action(task.step)
        ended.record(self._stream)
        self._issued[task.number] = Issued(task.step, started, ended)

    def collect(self) -> None:
        """Account for the steps that are over, and forget their events. Called by one thread, not the lane's own."""
        while (issued := self._issued.get(self._collected + 1)) and issued.ended.query():
            begin, end = (self._origin.time_of(e) for e in (issued.started, issued.ended))
            self.account(issued.step, begin, end)
            self._collected += 1
            del self._issued[self._collected]
            if end - self._origin.time_s > _EXACT_MS / 1000:
                self._origin = Origin(issued.ended, end)
            else:
                self._events.give_back(issued.started, issued.ended)

    def settle(self) -> None:
        """Until the device has done what it was given. Raises what it has failed with."""
        self._stream.synchronize()

    def _context(self) -> contextlib.AbstractContextManager[object]:
        context: contextlib.AbstractContextManager[object] = torch.cuda.stream(self._stream)
        return context
