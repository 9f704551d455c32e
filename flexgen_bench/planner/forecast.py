"""How long a planned job takes: a few passes of every kind run on simulated lanes, the others read off the line between
them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.tiers import Lane
from flexgen_bench.planner.cost import StepCost, rates_of
from flexgen_bench.planner.lane_sums import LaneSums
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.planner.pass_kinds import POINTS, Mix, coarse_kinds, mixes, pass_kinds
from flexgen_bench.planner.simulated_lanes import Contention, Event
from flexgen_bench.planner.simulator import SharedCores, Simulator, shared_links
from flexgen_bench.schedule.scheduled_job import ScheduledJob
from flexgen_bench.schedule.scheduler import Scheduler
from flexgen_bench.schedule.steps import Step


@dataclass(frozen=True)
class PassTime:
    """One pass of a job: seconds, and per lane the seconds it worked and the bytes it moved. outside_s, outside_bytes:
    of these, what is not for the layers but for embedding and head."""

    seconds: float
    is_prefill: bool
    busy_s: Mapping[Lane, float]
    bytes: Mapping[Lane, float]
    outside_s: Mapping[Lane, float] = field(default_factory=dict)
    outside_bytes: Mapping[Lane, float] = field(default_factory=dict)

    def deeper(self, times: float, overlap: bool) -> PassTime:
        """The pass through ``times`` as many layers."""

        def repeated(all_of_it: float, outside: float) -> float:
            return outside + times * (all_of_it - outside)

        out_s, out_bytes = self.outside_s, self.outside_bytes
        return replace(
            self,
            seconds=repeated(self.seconds, min(self.seconds, self._alone_s(overlap))),
            busy_s={lane: repeated(s, out_s.get(lane, 0.0)) for lane, s in self.busy_s.items()},
            bytes={lane: repeated(b, out_bytes.get(lane, 0.0)) for lane, b in self.bytes.items()},
        )

    def _alone_s(self, overlap: bool) -> float:
        """Seconds of the pass that are for embedding and head: of the link that is busy longest, where that is what
        binds; else of what computes, since a pass begins with the one and ends with the other."""
        if not overlap:
            return sum(self.outside_s[lane] for lane in sorted(self.outside_s))
        links: defaultdict[Lane, float] = defaultdict(float)
        outside: defaultdict[Lane, float] = defaultdict(float)
        for lane, seconds in self.busy_s.items():
            links[lane.link] += seconds
            outside[lane.link] += self.outside_s.get(lane, 0.0)
        longest = max(sorted(links), key=lambda lane: links[lane])
        if not longest.computes:
            return outside[longest]
        return sum(outside[lane] for lane in sorted(outside) if lane.computes)


@dataclass(frozen=True)
class Forecast:
    """The times of all passes, and every step of the simulated ones if it was asked for."""

    passes: tuple[PassTime, ...]
    events: tuple[Event, ...] = ()
    steps: int = 0  # simulated

    @property
    def prefill_s(self) -> float:
        """Seconds of the passes that only compute prompts, as the engine counts them."""
        return sum(p.seconds for p in self.passes if p.is_prefill)

    @property
    def decode_s(self) -> float:
        return sum(p.seconds for p in self.passes if not p.is_prefill)

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.decode_s

    def deeper(self, times: float, overlap: bool = True) -> Forecast:
        """The same job on a model with ``times`` as many layers; embedding and head stay as they are."""
        return Forecast(tuple(one.deeper(times, overlap) for one in self.passes), steps=self.steps)

    def busy_s(self) -> dict[Lane, float]:
        """By lane, in order; lanes that did nothing are left out."""
        lanes = _lanes(p.busy_s for p in self.passes)
        return {lane: sum(p.busy_s.get(lane, 0.0) for p in self.passes) for lane in lanes}

    def moved_bytes(self) -> dict[Lane, int]:
        lanes = _lanes(p.bytes for p in self.passes)
        return {lane: round(sum(p.bytes.get(lane, 0.0) for p in self.passes)) for lane in lanes}


def forecast(plan: MemoryPlan, *, points: int | None = POINTS, keep: bool = False) -> Forecast:
    """Of a planned job. points: passes of a kind that are simulated, None for all, and with fewer than usual kinds are
    told apart coarsely; keep: keep the times of every simulated step. UserError without rates.

    Of one rank of several: what it takes if hidden states and tokens are there when it wants them, and each wave is as
    long as the first."""
    cost = StepCost(plan)
    overlap = plan.policy.overlap
    stay = overlap and plan.job.tokens_stay
    simulator = Simulator(cost.times, overlap, contention(plan.hardware), keep, tokens_stay=stay)
    return _forecast(plan, cost, simulator, points, warm=True)


def closed_form(plan: MemoryPlan, *, points: int | None = POINTS) -> Forecast:
    """The same from sums over the steps of each pass (``lane_sums.py``): a bound that nothing but waiting adds to."""
    cost = StepCost(plan)
    sums = LaneSums(cost.times, plan.policy.overlap, plan.job)
    return _forecast(plan, cost, sums, points)


class PassTimer(Protocol):
    """What tells the seconds of a pass from its steps, and keeps account."""

    @property
    def busy_s(self) -> Mapping[Lane, float]: ...

    @property
    def bytes(self) -> Mapping[Lane, int]: ...

    @property
    def events(self) -> Sequence[Event]: ...

    @property
    def steps(self) -> int: ...

    def run_pass(self, steps: Iterable[Step]) -> float: ...


def _forecast(plan: MemoryPlan, cost: StepCost, timer: PassTimer, points: int | None, warm: bool = False) -> Forecast:
    """warm: a pass is simulated after one like that which comes before it: it finds its loads begun, or the disk still
    writing."""
    few = points is not None and points < POINTS
    kinds = (coarse_kinds if few else pass_kinds)(plan)
    made_of: list[Mix] = [{number: 1.0} for number in range(len(kinds))]
    if points is not None:
        made_of = mixes(kinds, points)
    scheduler = Scheduler(plan.policy, plan)
    itself = [mix == {number: 1.0} for number, mix in enumerate(made_of)]
    simulated: dict[int, PassTime] = {}
    latest: object = None  # kind of pass
    for number, (kind, _) in enumerate(kinds):
        if itself[number]:
            steps = scheduler.steps(scheduler.schedule())
            simulated[number] = _timed(timer, cost, plan.job, steps)
            latest = kind
        elif warm and itself[number + 1 : number + 2] == [True] and kind != latest:
            timer.run_pass(scheduler.steps(scheduler.schedule()))
            latest = kind
        else:
            scheduler.admit()
        scheduler.postprocess()
    of_wave = (mixed(mix, simulated) for mix in made_of)
    return Forecast(tuple(one for one in of_wave for _ in range(scheduler.waves)), tuple(timer.events), timer.steps)


def contention(hardware: HardwareProfile) -> Contention | None:
    """What lanes of this machine take from each other; None: nothing."""
    if hardware.accelerator is not Accelerator.EMULATED:
        return None if hardware.accelerator is Accelerator.NONE else shared_links
    memory = rates_of(hardware).sites[hardware.compute_tier].memory
    # Copying reads and writes memory, on one of the cores.
    links = [lane for lane in hardware.lanes if lane.is_link and lane.of_accelerator and lane.link is lane]
    shares = {lane.kind: min(0.5, 2 * rate / memory) for lane in links if (rate := hardware.link_rate(lane))}
    return SharedCores(shares)


def _timed(timer: PassTimer, cost: StepCost, job: ScheduledJob, steps: Iterable[Step]) -> PassTime:
    busy, moved = dict(timer.busy_s), dict(timer.bytes)
    only_prompts = True
    outside_s: defaultdict[Lane, float] = defaultdict(float)
    outside_bytes: defaultdict[Lane, float] = defaultdict(float)

    def watched() -> Iterator[Step]:
        nonlocal only_prompts
        for step in steps:
            if not step.on_weights:
                only_prompts = only_prompts and step.micro_batch.is_prefill
            if not job.units[step.unit].kind.repeats:
                outside_s[step.lane] += cost.seconds(step)
                outside_bytes[step.lane] += step.bytes
            yield step

    seconds = timer.run_pass(watched())
    return PassTime(
        seconds,
        only_prompts,
        {lane: s - busy.get(lane, 0.0) for lane, s in timer.busy_s.items()},
        {lane: float(b - moved.get(lane, 0)) for lane, b in timer.bytes.items()},
        outside_s,
        outside_bytes,
    )


def _lanes(mappings: Iterable[Mapping[Lane, float]]) -> list[Lane]:
    """All that are named, in order."""
    return sorted({lane for mapping in mappings for lane in mapping})


def mixed(mix: Mix, simulated: Mapping[int, PassTime]) -> PassTime:
    """A pass made of simulated ones."""
    parts = [(simulated[number], weight) for number, weight in mix.items()]
    if len(parts) == 1:
        return parts[0][0]

    def sums(of: Callable[[PassTime], Mapping[Lane, float]]) -> dict[Lane, float]:
        lanes = _lanes(of(p) for p, _ in parts)
        return {lane: sum(of(p).get(lane, 0.0) * w for p, w in parts) for lane in lanes}

    return PassTime(
        sum(p.seconds * w for p, w in parts),
        parts[0][0].is_prefill,
        sums(lambda p: p.busy_s),
        sums(lambda p: p.bytes),
        sums(lambda p: p.outside_s),
        sums(lambda p: p.outside_bytes),
    )
