"""Simulates the steps of a job on lanes: time is computed instead of spent.

The same steps, in the same order, with the same dependencies as the engine's executor runs: each lane in order, each
step as soon as what it waits for is done (``simulated_lanes.py``), the next pass when the host has seen the tokens of
the one before, or when they are on the accelerator if they stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from flexgen_bench.core.tiers import Lane, LaneKind
from flexgen_bench.planner.cost import StepTimes
from flexgen_bench.planner.simulated_lanes import Contention, SimulatedLanes
from flexgen_bench.schedule.dependencies import DependencyTracker
from flexgen_bench.schedule.steps import Step


class Simulator(SimulatedLanes):
    """Lanes of one job. ``run_pass`` takes a pass's steps and returns when the host has its tokens.

    overlap off: one step after the other. contention, keep: see ``SimulatedLanes``. tokens_stay: see ``ends_pass``.
    """

    def __init__(
        self,
        times: Callable[[Step], StepTimes],
        overlap: bool = True,
        contention: Contention | None = None,
        keep: bool = False,
        tokens_stay: bool = False,
    ) -> None:
        super().__init__(times, contention, keep)
        self._overlap, self._tokens_stay = overlap, tokens_stay
        self._tracker = DependencyTracker()
        self._last: dict[Lane, int] = {}

    def run_pass(self, steps: Iterable[Step]) -> float:
        """Seconds from the submission of a pass until its last step on a compute lane that the next one waits for is
        over. Loads for the next may go on."""
        begin, submit, last = self.now_s, self._tracker.add, self._last
        for step in steps:
            number, waits = submit(step)
            self.add(step, waits)
            last[step.lane] = number
            if not self._overlap:
                self.run_until(step.lane, number)
        for lane, number in last.items():
            if ends_pass(lane, self._tokens_stay):
                self.run_until(lane, number)
        return self.now_s - begin

    def drain(self) -> None:
        """Let everything end that was submitted."""
        for lane, number in self._last.items():
            self.run_until(lane, number)


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
