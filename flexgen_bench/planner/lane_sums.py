"""The time of a pass in closed form: the largest of a few sums over its steps.

Each sum is something that cannot go on beside itself, so none can be beaten: the steps of a lane, or of the lanes that share a link; the steps of a micro-batch, which
follow each other; what goes through a staging slot of weights, which is filled, used and filled again. Waiting that none of these explains (a
lane whose next step is not ready while others could be) is what only the simulator sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flexgen_bench.core.tiers import Lane, link_of
from flexgen_bench.planner.simulator import COMPUTE, Event
from flexgen_bench.schedule.job import Job
from flexgen_bench.schedule.steps import Step, StepKind


class LaneSums:
    """Sums of passes; stands in for the simulator. overlap off: everything follows everything."""

    def __init__(self, seconds: Callable[[Step], float], overlap: bool, job: Job) -> None:
        self._seconds, self._overlap, self._job = seconds, overlap, job
        self._streamed = {unit.index for unit in job.streamed}
        self.busy_s: dict[Lane, float] = dict.fromkeys(Lane, 0.0)
        self.bytes: dict[Lane, int] = dict.fromkeys(Lane, 0)
        self.events: list[Event] = []
        self.steps = 0

    def run_pass(self, steps: Iterable[Step]) -> float:
        """Seconds of one pass, once the loads of the next take the place of those that came before it."""
        lanes: dict[Lane, float] = dict.fromkeys(Lane, 0.0)
        chains: dict[int, float] = {}
        slots = 0.0
        for step in steps:
            seconds = self._seconds(step)
            lanes[step.lane] += seconds
            self.steps += 1
            self.bytes[step.lane] += step.bytes
            if step.work is not None:
                chains[step.work.index] = chains.get(step.work.index, 0.0) + seconds
            if step.kind is StepKind.LOAD_WEIGHTS or (
                step.unit in self._streamed and step.lane in COMPUTE
            ):
                slots += seconds
        together: dict[Lane, float] = dict.fromkeys(Lane, 0.0)
        for lane, seconds in lanes.items():
            self.busy_s[lane] += seconds
            together[link_of(lane)] += seconds
        if not self._overlap:
            return sum(lanes.values())
        return max(*together.values(), *chains.values(), slots / self._job.weight_slots)
