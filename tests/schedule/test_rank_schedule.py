"""Ranks of a pipeline: played on lanes that go at random speeds, they never wait for each other in a circle."""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.pipeline import Stage, even_stages, stages_of
from flexgen_bench.core.policy import Placement, Policy, Schedule
from flexgen_bench.core.tiers import Lane, LaneKind, Tier
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.schedule.dependencies import DependencyTracker
from flexgen_bench.schedule.micro_batch import MicroBatch
from flexgen_bench.schedule.scheduled_job import UnitKind
from flexgen_bench.schedule.scheduler import Scheduler, ending
from flexgen_bench.schedule.sequence_groups import Request
from flexgen_bench.schedule.steps import Step, StepKind
from tests.schedule.test_schedule import EMULATED, HOST, LAYERS, MIXTURE, MODEL, Case, cases

Message = tuple[str, int]  # what it is, and the number of its micro-batch


@dataclass
class Pass:
    """wave: whose it is; ends: of the lanes whose last step is waited for, the number of that step."""

    wave: int
    batches: list[MicroBatch]
    ends: dict[Lane, int]


@dataclass
class Played:
    """A rank: its lanes with what waits on them, what has come to it and how much of what it sent is under way."""

    plan: MemoryPlan
    policy: Policy
    case: Case
    passes: deque[Pass] = field(default_factory=deque)
    done: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.policy, self.plan)
        self.tracker = DependencyTracker()
        self.queues: defaultdict[Lane, deque[tuple[Step, int, dict[Lane, int]]]] = defaultdict(deque)
        self.reached: Counter[Lane] = Counter()
        self.come: Counter[Message] = Counter()
        self.under_way = 0
        self.wave = 0
        self.tokens = dict.fromkeys(range(len(self.case.requests)), 0)

    @property
    def is_done(self) -> bool:
        return self.scheduler.is_done and not self.passes

    def submit(self) -> None:
        """As many passes as there are waves, in turn; a wave's next one when its last one is over."""
        waves = self.scheduler.waves
        while len(self.passes) < waves:
            busy = {one.wave for one in self.passes}
            turn = [w for n in range(waves) if (w := (self.wave + n) % waves) not in busy]
            wave = next((w for w in turn if self.scheduler.has_work(w)), None)
            if wave is None:
                return
            batches = self.scheduler.schedule(wave)
            ends = {}
            for step in self.scheduler.steps(batches):
                number, waits = self.tracker.add(step)
                self.queues[step.lane].append((step, number, dict(waits)))
                if step.lane.computes or step.kind is StepKind.RECV_TOKENS:
                    ends[step.lane] = number
            self.passes.append(Pass(wave, batches, ends))
            self.wave = (wave + 1) % waves

    def finish(self) -> None:
        """Passes whose tokens are there, in order."""
        while self.passes and all(self.reached[lane] >= n for lane, n in self.passes[0].ends.items()):
            one = self.passes.popleft()
            for batch in one.batches:
                for member in batch.members:
                    for place in ending(member):
                        self.tokens[member.group.sequences[place]] += 1
            self.scheduler.postprocess(
                lambda group: [
                    i
                    for i in group.sequences
                    if self.tokens[i] >= min(self.case.requests[i].gen_len, self.case.early.get(i, 99))
                ],
                one.wave,
            )
            self.submit()

    def ready(self) -> list[Lane]:
        return [lane for lane, queue in self.queues.items() if queue and self._can_begin(*queue[0])]

    def _can_begin(self, step: Step, number: int, waits: dict[Lane, int]) -> bool:
        if any(self.reached[lane] < n for lane, n in waits.items()):
            return False
        if step.kind is StepKind.SEND_HIDDEN:
            return self.under_way + step.bytes <= self.plan.staging.outbox
        return step.kind not in RECEIVED or self.come[RECEIVED[step.kind], step.micro_batch_index] > 0


RECEIVED = {StepKind.RECV_HIDDEN: "hidden", StepKind.RECV_TOKENS: "tokens"}


def play(case: Case, stages: tuple[Stage, ...], rng: random.Random) -> list[Played]:
    """All ranks to the end of a job, one step of any lane that can go on at a time."""
    model = MODEL if case.policy.experts is None else MIXTURE
    ranks = [
        Played(plan_job(model, case.policy, case.hardware, case.requests, stage=stage), case.policy, case)
        for stage in stages
    ]
    for rank in ranks:
        rank.submit()
    while not all(rank.is_done for rank in ranks):
        ready = [(rank, lane) for rank in ranks for lane in rank.ready()]
        assert ready, "deadlock: no lane of any rank can go on"
        rank, lane = rng.choice(ready)
        step, number, _ = rank.queues[lane].popleft()
        place = ranks.index(rank)
        if step.kind is StepKind.SEND_HIDDEN:
            rank.under_way += step.bytes
            ranks[place + 1].come["hidden", step.micro_batch_index] += 1
        elif step.kind is StepKind.SEND_TOKENS:
            for other in ranks[:-1]:
                other.come["tokens", step.micro_batch_index] += 1
        elif step.kind in RECEIVED:
            rank.come[RECEIVED[step.kind], step.micro_batch_index] -= 1
            if step.kind is StepKind.RECV_HIDDEN:
                ranks[place - 1].under_way -= step.bytes
        rank.reached[lane] = number
        rank.done.append(step)
        rank.finish()
    return ranks


@given(cases(), st.integers(2, 3), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_ranks_never_wait_for_each_other_in_a_circle(case: Case, count: int, seed: int) -> None:
    """Whatever the policy, the speeds of lanes and who ends early: with no more room for what is under way than is
    planned, every rank comes to the end of the job, and all have got the same tokens."""
    ranks = play(case, even_stages(LAYERS, count), random.Random(seed))
    expected = {i: min(r.gen_len, case.early.get(i, 99)) for i, r in enumerate(case.requests)}
    for rank in ranks:
        assert rank.tokens == expected
        assert not any(rank.queues[lane] for lane in rank.queues if not lane.kind.startswith(("disk", "h2d")))
        assert not any(rank.come.values()), "a message that nobody has taken"


@pytest.mark.slow
@given(cases(), st.integers(2, 3), st.integers(0, 10**6))
@settings(max_examples=500, deadline=None)
def test_five_hundred_random_policies(case: Case, count: int, seed: int) -> None:
    play(case, even_stages(LAYERS, count), random.Random(seed))


def of_four(schedule: Schedule = Schedule.BLOCK) -> Case:
    policy = Policy(gpu_batch_size=2, num_gpu_batches=1, schedule=schedule)
    return Case(policy, HOST, (Request(3, 4),) * 12, {})


@pytest.mark.parametrize("layers", [[1, 1, 1], [2, 1], [1, 2]])
def test_every_unit_is_computed_by_one_rank(layers: list[int]) -> None:
    ranks = play(of_four(), stages_of(layers, LAYERS), random.Random(0))
    computed = [
        {s.unit for s in rank.done if s.lane.computes and s.kind not in (StepKind.ENTER, StepKind.LEAVE)}
        for rank in ranks
    ]
    assert sorted(unit for units in computed for unit in units) == list(range(LAYERS + 2))
    assert [len(units) for units in computed] == [n + (r in (0, len(layers) - 1)) for r, n in enumerate(layers)]


def test_as_many_passes_are_under_way_as_there_are_ranks() -> None:
    """Twelve sequences in micro-batches of two: three ranks have three of them at once, each another one."""
    case = of_four()
    plan = plan_job(MODEL, case.policy, HOST, case.requests, stage=even_stages(LAYERS, 3)[0])
    rank = Played(plan, case.policy, case)
    rank.submit()
    assert [one.wave for one in rank.passes] == [0, 1, 2]
    taken = [{m.group.kv_slot for b in one.batches for m in b.members} for one in rank.passes]
    assert taken == [{0}, {1}, {2}]


def test_what_crosses_the_network() -> None:
    """Hidden states once a token and boundary, tokens once a sequence and other rank."""
    ranks = play(of_four(), even_stages(LAYERS, 3), random.Random(1))
    rows = 12 * (3 + 3)  # of prompts, and of later tokens but the last
    for rank, before, after in zip(ranks, (False, True, True), (True, True, False), strict=True):
        moved: Counter[LaneKind] = Counter()
        for step in rank.done:
            moved[step.lane.kind] += step.bytes
        hidden = rows * rank.plan.job.hidden_row_bytes
        assert moved[LaneKind.NET_IN] == before * hidden
        assert moved[LaneKind.NET_OUT] == (hidden if after else 12 * 4 * 8 * 2)
        assert moved[LaneKind.NET_TOKENS] == after * 12 * 4 * 8


def test_a_rank_holds_its_own_units_and_caches_alone() -> None:
    """Two ranks together have the weights of one, and the caches; a tied head brings its table along."""
    case = of_four()
    whole = plan_job(MODEL, case.policy, HOST, case.requests)
    parts = [plan_job(MODEL, case.policy, HOST, case.requests, stage=stage) for stage in even_stages(LAYERS, 2)]
    assert whole.job.stage is None
    assert whole.groups.waves == 1
    held = [{u.index for u in part.job.own} for part in parts]
    assert held == [{0, 1, 2}, {3, 4}]
    weights = [sum(parts.get("weights", 0) for parts in plan.bytes.values()) for plan in (whole, *parts)]
    table = MODEL.packed.head.num_bytes if MODEL.packed.tied else 0
    assert abs(sum(weights[1:]) - weights[0] - table) <= MODEL.packed.units[0].home_bytes
    kv = [sum(parts.get("kv_cache", 0) for parts in plan.bytes.values()) for plan in (whole, *parts)]
    # Of twice as many sequences at once, but in their own layers alone.
    assert kv[1] * 3 == 2 * kv[0] * 2
    assert kv[2] * 3 == 2 * kv[0] * 1
    host = [plan.bytes[plan.job.site_of(Tier.CPU)] for plan in parts]
    assert "outbox" in host[0]
    assert "inbox" not in host[0]
    assert "inbox" in host[1]
    assert "outbox" not in host[1]


def test_layers_are_divided_evenly_and_as_asked_for() -> None:
    assert [len(s.layers) for s in even_stages(30, 4)] == [7, 8, 8, 7]
    assert [len(s.layers) for s in even_stages(5, 2)] == [3, 2]
    assert [(s.first, s.stop) for s in stages_of([1, 3], 4)] == [(0, 1), (1, 4)]
    for layers in ([0, 4], [2, 1], [5], [-1, 5]):
        with pytest.raises(UserError, match="layers_per_rank"):
            stages_of(layers, 4)
    with pytest.raises(UserError, match="one layer for each rank"):
        even_stages(3, 4)


def test_one_rank_is_no_pipeline() -> None:
    case = of_four()
    alone = plan_job(MODEL, case.policy, EMULATED, case.requests, stage=Stage(0, 1, 0, LAYERS))
    assert alone.job.stage is None
    assert alone.job.own == alone.job.units
    assert all(unit.kind is not UnitKind.EXPERTS for unit in alone.job.sweep)


def test_loads_go_on_while_another_wave_has_a_pass_to_come() -> None:
    """The last pass of the first wave was taken for the job's last one, so those of all other waves waited for weights
    that could have been on their way."""
    policy = Policy(gpu_batch_size=2, num_gpu_batches=1, weights=Placement(disk=1))
    requests = (Request(3, 2),) * 6
    plan = plan_job(MODEL, policy, HOST, requests, stage=even_stages(LAYERS, 3)[1])
    scheduler, loads = Scheduler(policy, plan), []
    for wave in (0, 1, 2, 0, 1, 2):
        steps = list(scheduler.steps(scheduler.schedule(wave)))
        loads.append(sum(step.kind is StepKind.LOAD_WEIGHTS for step in steps))
        if wave == 2:
            for one in range(3):
                scheduler.postprocess(wave=one)
    assert sum(loads) == 6, "one layer, once a pass"
    assert loads[-1] == 0, "of the last pass, all were on their way before"
