"""The time of a pass in closed form: the largest of a few sums over its steps.

Each sum is something that cannot go on beside itself: the steps of a lane, or of the lanes that share a link; what a
lane's thread on the host issues to a device; steps of which each needs what the one before made; what goes through a
tier's staging buffers of weights, which are filled, used and filled again. Waiting that none of these explains (a lane
whose next step is not ready while others could be) is what only the simulator sees. A sum can be beaten only by what
the pass leaves to the next one, or did for it: stores that nobody waits for, and loads of weights ahead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from flexgen_bench.core.tiers import Lane, Site
from flexgen_bench.planner.cost import StepTimes
from flexgen_bench.planner.simulated_lanes import Event
from flexgen_bench.planner.simulator import ends_pass
from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.scheduled_job import ScheduledJob, UnitKind
from flexgen_bench.schedule.steps import Step, StepKind


class LaneSums:
    """Sums of passes; stands in for the simulator. overlap off: everything follows everything."""

    def __init__(self, times: Callable[[Step], StepTimes], overlap: bool, job: ScheduledJob) -> None:
        self._times, self._overlap, self._job = times, overlap, job
        self._tokens_stay = overlap and job.tokens_stay
        # A head comes in pieces, of which each makes room for its successor by itself.
        self._streamed = {u.index for u in job.streamed if u.kind.repeats}
        self.busy_s: defaultdict[Lane, float] = defaultdict(float)
        self.bytes: defaultdict[Lane, int] = defaultdict(int)
        self.events: list[Event] = []
        self.steps = 0

    def run_pass(self, steps: Iterable[Step]) -> float:
        """Seconds of one pass, once the loads of the next take the place of those that came before it."""
        lanes: defaultdict[Lane, float] = defaultdict(float)
        issued: defaultdict[Lane, float] = defaultdict(float)
        one_by_one = 0.0
        made: dict[Buffer, float] = {}  # when, if only what it is made of is waited for
        chain = 0.0
        held_s: dict[tuple[Site, UnitKind], float] = {}
        for step in steps:
            seconds, issue_s = self._times(step)
            lanes[step.lane] += seconds
            issued[step.lane] += issue_s
            one_by_one += max(seconds, issue_s)
            self.steps += 1
            self.bytes[step.lane] += step.bytes
            done = seconds + max((made.get(buffer, 0.0) for buffer in (*step.reads, *step.writes)), default=0.0)
            made.update(dict.fromkeys(step.writes, done))
            if ends_pass(step.lane, self._tokens_stay):
                chain = max(chain, done)
            if step.unit in self._streamed:
                self._add_buffers(held_s, step, seconds)
        together: defaultdict[Lane, float] = defaultdict(float)
        for lane, seconds in lanes.items():
            self.busy_s[lane] += seconds
            together[lane.link] += seconds
        if not self._overlap:
            return one_by_one
        held = max(held_s.values(), default=0.0) / self._job.weight_buffers
        return max(chain, held, *together.values(), *issued.values())

    def _add_buffers(self, held_s: dict[tuple[Site, UnitKind], float], step: Step, seconds: float) -> None:
        """Buffers are held while they are filled, and while their weights move on or are computed with."""
        unit = self._job.units[step.unit]
        held: tuple[Site, ...] = (unit.site,) if step.lane is unit.site.lane else ()
        if step.kind is StepKind.LOAD_WEIGHTS:
            held = tuple(site for site in unit.path if site.tier in step.lane.ends)
        for site in held:
            held_s[site, unit.kind] = held_s.get((site, unit.kind), 0.0) + seconds
