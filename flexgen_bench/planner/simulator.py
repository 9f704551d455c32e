"""Simulates the steps of a job on lanes: time is computed instead of spent.

The same steps, in the same order, with the same dependencies as the engine's executor runs: each lane in order, each
step as soon as what it waits for is done, the next pass when the host has seen the tokens of the one before, or when
they are on the accelerator if they stay there.

A lane of a device with streams has a thread of the host that issues its steps, as far ahead as there are any: a step
ends when its work is done, and not before it has been issued. The thread issues one after the other, and a step when
those of other streams that it waits for have been issued and those of the host are over. (That such threads hold each
other up in the interpreter is not simulated.)
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flexgen_bench.core.tiers import Lane, LaneKind
from flexgen_bench.planner.cost import StepTimes
from flexgen_bench.schedule.dependencies import Dependencies, DependencyTracker
from flexgen_bench.schedule.steps import Step

# Lanes that have work -> how fast each goes, 1 being undisturbed.
Contention = Callable[[Iterable[Lane]], Mapping[Lane, float]]
_DONE_S = 1e-12  # less work than this is none: what is left over from rounding


@dataclass(frozen=True)
class Event:
    """One step on the simulated time line, in seconds since the job began."""

    step: Step
    begin_s: float
    end_s: float


@dataclass(slots=True)
class _Running:
    step: Step
    left_s: float
    begin_s: float


_Queue = deque[tuple[Step, Dependencies, float]]  # with the time at which the step was handed over


class Simulator:
    """Lanes and their clocks. ``run_pass`` takes a pass's steps and returns when the host has its tokens.

    overlap off: one step after the other. contention: what lanes take from each other. keep: whether to keep every
    step's times in ``events``. tokens_stay: see ``ends_pass``.
    """

    def __init__(
        self,
        times: Callable[[Step], StepTimes],
        overlap: bool = True,
        contention: Contention | None = None,
        keep: bool = False,
        tokens_stay: bool = False,
    ) -> None:
        self._tokens_stay = tokens_stay
        self._times, self._overlap, self._contention = times, overlap, contention
        self._tracker = DependencyTracker()
        self._waiting: dict[Lane, _Queue] = {}
        self._lanes: list[tuple[Lane, _Queue]] = []  # the same, in the order of lanes
        # Of every step of a lane, when one of a stream that waits for it may be issued: at its end, or, on a stream
        # itself, once it has been issued.
        self._passed_s: defaultdict[Lane, list[float]] = defaultdict(list)
        self._running: dict[Lane, _Running] = {}
        # What contention has said, asked once, by the lanes that have work; None: all go undisturbed.
        self._speeds: dict[tuple[Lane, ...], Mapping[Lane, float] | None] = {}
        self._done: defaultdict[Lane, int] = defaultdict(int)
        self._last: dict[Lane, int] = {}
        self._kept = keep
        self.now_s = 0.0
        self.busy_s: defaultdict[Lane, float] = defaultdict(float)
        self.bytes: defaultdict[Lane, int] = defaultdict(int)
        self.events: list[Event] = []
        self.steps = 0

    def run_pass(self, steps: Iterable[Step]) -> float:
        """Seconds from the submission of a pass until its last step on a compute lane that the next one waits for is
        over. Loads for the next may go on."""
        begin, submit = self.now_s, self._tracker.add
        waiting, last, overlap = self._waiting, self._last, self._overlap
        for step in steps:
            lane = step.lane
            number, waits = submit(step)
            queue = waiting.get(lane)
            if queue is None:
                queue = self._add_lane(lane)
            queue.append((step, waits, self.now_s))
            last[lane] = number
            self.steps += 1
            if not overlap:
                self._run_until(lane, number)
        for lane, number in last.items():
            if ends_pass(lane, self._tokens_stay):
                self._run_until(lane, number)
        return self.now_s - begin

    def drain(self) -> None:
        """Let everything end that was submitted."""
        for lane, number in self._last.items():
            self._run_until(lane, number)

    def _add_lane(self, lane: Lane) -> _Queue:
        self._waiting[lane] = deque()
        self._lanes = sorted(self._waiting.items(), key=lambda one: one[0])
        return self._waiting[lane]

    def _run_until(self, lane: Lane, number: int) -> None:
        done = self._done
        while done[lane] < number:
            self._start()
            self._advance()

    def _start(self) -> None:
        """Whatever is first in its lane and has all it waits for begins."""
        done, running = self._done, self._running
        for lane, waiting in self._lanes:
            if waiting and lane not in running:
                step, waits, given_s = waiting[0]
                for other, n in waits.items():
                    if done[other] < n:
                        break
                else:
                    waiting.popleft()
                    seconds, issue_s = self._times(step)
                    if lane.of_accelerator:
                        issued_s = self._issuable_s(lane, waits, given_s) + issue_s
                        seconds = max(seconds, issued_s - self.now_s)
                        self._passed_s[lane].append(issued_s)
                    running[lane] = _Running(step, seconds, self.now_s)

    def _issuable_s(self, lane: Lane, waits: Dependencies, given_s: float) -> float:
        """When the lane's thread could begin to issue a step that waits for others."""
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
                self.busy_s[lane] += self.now_s - one.begin_s
                self.bytes[lane] += one.step.bytes
                if not lane.of_accelerator:
                    self._passed_s[lane].append(self.now_s)
                if self._kept:
                    self.events.append(Event(one.step, one.begin_s, self.now_s))
                ended = [lane] if ended is None else [*ended, lane]
        for lane in ended or ():
            del running[lane]

    def _speed(self, contention: Contention) -> Mapping[Lane, float] | None:
        lanes = tuple(self._running)
        if lanes not in self._speeds:
            speed = contention(lanes)
            self._speeds[lanes] = speed if any(s != 1 for s in speed.values()) else None
        return self._speeds[lanes]


def ends_pass(lane: Lane, tokens_stay: bool) -> bool:
    """Whether a pass is over only when its last step on this lane is. tokens_stay: the host need not have seen the
    tokens of one pass before the next one begins."""
    return lane.of_accelerator and not lane.is_link if tokens_stay else lane.computes


def shared_links(lanes: Iterable[Lane]) -> Mapping[Lane, float]:
    """Contention of every machine: lanes that work on the same link have equal parts of it."""
    active = list(lanes)
    links = [lane.link for lane in active]
    return {lane: 1 / links.count(link) for lane, link in zip(active, links, strict=True)}


@dataclass(frozen=True)
class SharedCores:
    """Contention of an emulated accelerator, beside that of links: both compute lanes want all cores, and copying over
    its links takes some of them.

    link_shares: of all cores, what a link of each kind takes while it copies.
    """

    link_shares: Mapping[LaneKind, float] = field(default_factory=dict)

    def __call__(self, lanes: Iterable[Lane]) -> Mapping[Lane, float]:
        links = shared_links(lanes)
        copying = sum(self.link_shares.get(lane.link.kind, 0.0) * s for lane, s in links.items())
        computing = sum(lane.computes for lane in links)
        speed = max(0.05, 1 - copying) / max(1, computing)
        return {lane: speed if lane.computes else links[lane] for lane in links}
