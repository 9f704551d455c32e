"""How long a job takes over several ranks: a few rounds of every kind run on simulated lanes of all ranks, the others
read off the line between them.

A round is a pass of every wave. In it each rank computes one pass for each rank there is, and passes of neighbouring
rounds overlap, so a round's time is that from the end of the one before to its own: of the first, all that it takes a
pipeline to fill.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flexgen_bench.core.tiers import Lane
from flexgen_bench.planner.forecast import Forecast, PassTime, mixed
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.planner.pass_kinds import POINTS, Mix, PassKind, kind_of, mixes
from flexgen_bench.planner.rank_machines import RankMachine
from flexgen_bench.planner.rank_simulator import Ends, RankSimulator
from flexgen_bench.planner.simulated_lanes import LaneSeconds
from flexgen_bench.schedule.micro_batch import MicroBatch
from flexgen_bench.schedule.scheduler import Scheduler
from flexgen_bench.schedule.steps import Step


@dataclass(frozen=True)
class RankForecast:
    """times: its passes are rounds, its lanes those of all ranks. plans: of each rank."""

    times: Forecast
    plans: tuple[MemoryPlan, ...]

    @property
    def total_s(self) -> float:
        return self.times.total_s

    def of_rank(self, rank: int) -> Forecast:
        """What a rank does, on lanes as they are called in its own process."""

        def own(values: Mapping[Lane, float]) -> dict[Lane, float]:
            return {Lane(lane.kind): value for lane, value in values.items() if lane.device == rank}

        passes = (replace(one, busy_s=own(one.busy_s), bytes=own(one.bytes)) for one in self.times.passes)
        return Forecast(tuple(passes))

    def busy_shares(self, rank: int) -> dict[Lane, float]:
        """Of the job's time, what each of a rank's lanes works, on lanes as they are called in its own process."""
        return {lane: seconds / self.total_s for lane, seconds in self.of_rank(rank).busy_s().items()}

    @property
    def slowest(self) -> int:
        """The rank with the lane that works longest: the others wait for it."""
        return max(range(len(self.plans)), key=lambda rank: max(self.busy_shares(rank).values()))

    def bubble(self, rank: int) -> float:
        """Of the job's time, what a rank computes nothing in: the part that its computing lane waits, for hidden states
        of the rank before or for anything else."""
        return 1 - self.busy_shares(rank).get(self.plans[rank].job.site.lane, 0.0)


def rank_forecast(
    plans: Sequence[MemoryPlan],
    machines: Sequence[RankMachine] | None = None,
    *,
    points: int | None = POINTS,
    keep: bool = False,
) -> RankForecast:
    """Of a job that is planned for every rank. machines: what each runs on; None: machines of their own. points: rounds
    of a kind that are simulated, None for all; keep: keep the times of every simulated step. UserError without
    rates."""
    rounds = round_kinds(plans[0])
    made_of: list[Mix] = [{number: 1.0} for number in range(len(rounds))]
    if points is not None:
        made_of = mixes(rounds, points)
    itself = [mix == {number: 1.0} for number, mix in enumerate(made_of)]
    watched = _Watched(RankSimulator(plans, machines, keep))
    turns = _Turns(plans)
    latest: object = None  # kind of round
    for number, (kind, _) in enumerate(rounds):
        # A round is simulated after one like that which comes before it.
        warms = itself[number + 1 : number + 2] == [True] and kind != latest
        if not itself[number] and not warms:
            for wave in turns.next_round():
                turns.skip(wave)
            continue
        for wave in turns.next_round():
            watched.submit(wave, number, *turns.scheduled(wave))
        latest = kind
    simulated = watched.ended()
    passes = tuple(mixed(mix, simulated) for mix in made_of)
    simulator = watched.simulator
    return RankForecast(Forecast(passes, tuple(simulator.events), simulator.steps), tuple(plans))


def round_kinds(plan: MemoryPlan) -> list[PassKind]:
    """Of every round of a job in which no sequence ends early, from the plan of any rank."""
    turns, kinds = _Turns([plan]), list[PassKind]()
    before: object = None  # passes of neighbouring rounds are under way together
    while not turns.is_done:
        passes = [kind_of(turns.scheduled(wave)[0]) for wave in turns.next_round()]
        if passes:
            own = tuple(one.kind for one in passes)
            kinds.append(PassKind((own, before), sum(one.amount for one in passes)))
            before = own
    # Nothing is loaded beyond the last.
    return [*kinds[:-1], PassKind((*kinds[-1].kind, "last"), kinds[-1].amount)]


class _Turns:
    """Whose pass comes next, and of which micro-batches, on all ranks alike."""

    def __init__(self, plans: Sequence[MemoryPlan]) -> None:
        self._schedulers = [Scheduler(plan.policy, plan) for plan in plans]
        self._under_way: set[int] = set()  # waves

    @property
    def is_done(self) -> bool:
        return self._schedulers[0].is_done

    def next_round(self) -> Iterator[int]:
        """The waves with work, each when its last pass is over."""
        for wave in range(self._schedulers[0].waves):
            if wave in self._under_way:
                self._under_way.remove(wave)
                for scheduler in self._schedulers:
                    scheduler.postprocess(wave=wave)
            if self._schedulers[0].has_work(wave):
                self._under_way.add(wave)
                yield wave

    def skip(self, wave: int) -> None:
        """A pass whose steps nobody wants."""
        for scheduler in self._schedulers:
            scheduler.admit(wave)

    def scheduled(self, wave: int) -> tuple[list[MicroBatch], list[Iterator[Step]]]:
        """The micro-batches of a pass, and its steps on each rank."""
        batches = [scheduler.schedule(wave) for scheduler in self._schedulers]
        steps = [one.steps(own) for one, own in zip(self._schedulers, batches, strict=True)]
        return batches[0], steps


class _Watched:
    """A simulator that is given rounds, and what each of them took."""

    def __init__(self, simulator: RankSimulator) -> None:
        self.simulator = simulator
        self._under_way: dict[int, tuple[int, Ends]] = {}  # wave -> its round and what ends it, in order of submission
        self._only_prompts: dict[int, bool] = {}
        self._work: dict[int, LaneSeconds] = {}
        self._ends_s: dict[int, float] = {}

    def submit(self, wave: int, number: int, batches: list[MicroBatch], steps: list[Iterator[Step]]) -> None:
        """A wave's pass in a round, once its last one is over."""
        if wave in self._under_way:
            self._finish(wave)
        prompts = all(batch.is_prefill for batch in batches)
        self._only_prompts[number] = self._only_prompts.get(number, True) and prompts
        work = self._work.setdefault(number, LaneSeconds())
        self._under_way[wave] = number, self.simulator.submit(steps, work)

    def ended(self) -> dict[int, PassTime]:
        """What each round took, once all are over."""
        for wave in list(self._under_way):
            self._finish(wave)
        found, before_s = {}, 0.0
        self.simulator.drain()
        for number, end_s in self._ends_s.items():
            work = self._work[number]
            found[number] = PassTime(end_s - before_s, self._only_prompts[number], work.busy_s, work.bytes)
            before_s = end_s
        return found

    def _finish(self, wave: int) -> None:
        number, ends = self._under_way.pop(wave)
        self.simulator.finish(ends)
        self._ends_s[number] = self.simulator.now_s
