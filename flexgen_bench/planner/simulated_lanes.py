"""Lanes that work off their steps in simulated time: each in order, each step as soon as what it waits for is done.

A lane of a device with streams has a thread of the host that issues its steps, as far ahead as there are any: a step
ends when its work is done, and not before it has been issued. The thread issues one after the other, and a step when
those of other streams that it waits for have been issued and those of the host are over. (That such threads hold each
other up in the interpreter is not simulated.)
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flexgen_bench.core.tiers import Lane
from flexgen_bench.planner.cost import StepTimes
from flexgen_bench.schedule.dependencies import Dependencies
from flexgen_bench.schedule.steps import Step

# Lanes that have work -> how fast each goes, 1 being undisturbed.
Contention = Callable[[Iterable[Lane]], Mapping[Lane, float]]
_DONE_S = 1e-12  # less work than this is none: what is left over from rounding
AT_BEGIN = -1.0  # stands for a time at which a step is handed over: when it can begin, not ahead of it


@dataclass(frozen=True)
class Event:
    """One step on the simulated time line, in seconds since the job began."""

    step: Step
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class LaneSeconds:
    """By lane, the seconds it has worked and the bytes it has moved."""

    busy_s: defaultdict[Lane, float] = field(default_factory=lambda: defaultdict(float))
    bytes: defaultdict[Lane, int] = field(default_factory=lambda: defaultdict(int))


@dataclass(slots=True)
class _Running:
    step: Step
    left_s: float
    begin_s: float
    account: LaneSeconds


# With the time at which the step was handed over, and where its work is counted.
_Queue = deque[tuple[Step, Dependencies, float, LaneSeconds]]


class SimulatedLanes:
    """Lanes, their clock, and what each has done. contention: what lanes take from each other. keep: whether to keep
    every step's times in ``events``."""

    def __init__(
        self, times: Callable[[Step], StepTimes], contention: Contention | None = None, keep: bool = False
    ) -> None:
        self._times, self._contention = times, contention
        self._waiting: dict[Lane, _Queue] = {}
        self._order: dict[Lane, int] = {}  # of lanes
        self._awake: set[Lane] = set()  # whose first step may have all that it waits for
        self._asleep: defaultdict[Lane, list[Lane]] = defaultdict(list)  # until that lane ends a step
        # Of every step of a lane, when one of a stream that waits for it may be issued: at its end, or, on a stream
        # itself, once it has been issued.
        self._passed_s: defaultdict[Lane, list[float]] = defaultdict(list)
        self._running: dict[Lane, _Running] = {}
        # What contention has said, asked once, by the lanes that have work; None: all go undisturbed.
        self._speeds: dict[tuple[Lane, ...], Mapping[Lane, float] | None] = {}
        self._done: defaultdict[Lane, int] = defaultdict(int)
        self._kept = keep
        self.now_s = 0.0
        self._whole = LaneSeconds()
        self.busy_s, self.bytes = self._whole.busy_s, self._whole.bytes
        self.events: list[Event] = []
        self.steps = 0

    def add(
        self, step: Step, waits: Dependencies, given_s: float | None = None, account: LaneSeconds | None = None
    ) -> None:
        """Hand over a step. waits: for how many steps of which lanes. given_s: when; None: now. account: where its work
        is counted; None: with that of all."""
        lane = step.lane
        queue = self._waiting.get(lane)
        if queue is None:
            queue = self._waiting[lane] = deque()
            self._order = {one: place for place, one in enumerate(sorted(self._waiting))}
        if not queue:
            self._awake.add(lane)
        queue.append((step, waits, self.now_s if given_s is None else given_s, account or self._whole))
        self.steps += 1

    def run_until(self, lane: Lane, number: int) -> None:
        """Until a lane has ended so many steps."""
        done = self._done
        while done[lane] < number:
            self._start()
            self._advance()

    def _start(self) -> None:
        """Whatever is first in its lane and has all it waits for begins."""
        done, running = self._done, self._running
        awake, order = sorted(self._awake, key=self._order.__getitem__), self._waiting
        self._awake.clear()
        for lane in awake:
            waiting = order[lane]
            if waiting and lane not in running:
                step, waits, given_s, account = waiting[0]
                for other, n in waits.items():
                    if done[other] < n:
                        self._asleep[other].append(lane)
                        break
                else:
                    waiting.popleft()
                    seconds, issue_s = self._times(step)
                    if lane.of_accelerator:
                        issued_s = self._issuable_s(lane, waits, given_s) + issue_s
                        seconds = max(seconds, issued_s - self.now_s)
                        self._passed_s[lane].append(issued_s)
                    running[lane] = _Running(step, seconds, self.now_s, account)

    def _issuable_s(self, lane: Lane, waits: Dependencies, given_s: float) -> float:
        """When the lane's thread could begin to issue a step that waits for others."""
        if given_s == AT_BEGIN:
            return self.now_s
        passed = self._passed_s
        earlier = passed[lane]
        begin_s = max(given_s, earlier[-1]) if earlier else given_s
        for other, number in waits.items():
            begin_s = max(begin_s, passed[other][number - 1])
        return begin_s

    def _advance(self) -> None:
        """To the next end of a step."""
        running = self._running
        assert running, "a step waits for one that comes after it on a lane"
        speed = None if self._contention is None else self._speed(self._contention)
        if speed is None:
            passed = min([one.left_s for one in running.values()])
            for one in running.values():
                one.left_s -= passed
        else:
            passed = min([one.left_s / speed[lane] for lane, one in running.items()])
            for lane, one in running.items():
                one.left_s -= passed * speed[lane]
        self.now_s += passed
        ended = None
        for lane, one in running.items():
            if one.left_s <= _DONE_S:
                self._done[lane] += 1
                one.account.busy_s[lane] += self.now_s - one.begin_s
                one.account.bytes[lane] += one.step.bytes
                if not lane.of_accelerator:
                    self._passed_s[lane].append(self.now_s)
                if self._kept:
                    self.events.append(Event(one.step, one.begin_s, self.now_s))
                ended = [lane] if ended is None else [*ended, lane]
        for lane in ended or ():
            del running[lane]
            self._awake.add(lane)
            self._awake.update(self._asleep.pop(lane, ()))

    def _speed(self, contention: Contention) -> Mapping[Lane, float] | None:
        lanes = tuple(self._running)
        if lanes not in self._speeds:
            speed = contention(lanes)
            self._speeds[lanes] = speed if any(s != 1 for s in speed.values()) else None
        return self._speeds[lanes]
