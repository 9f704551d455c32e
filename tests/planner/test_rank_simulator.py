"""Ranks of a pipeline on one clock: held against the simulator of a single one, and against what must be true of any
number of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_bench.core.pipeline import Stage, even_stages, stages_of
from flexgen_bench.core.policy import AttentionSite, Placement, Policy, Schedule
from flexgen_bench.core.tiers import Lane, LaneKind, Tier
from flexgen_bench.planner.forecast import forecast
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.planner.pass_kinds import POINTS
from flexgen_bench.planner.rank_forecast import RankForecast, rank_forecast
from flexgen_bench.planner.rank_machines import RankMachine, in_one_machine
from flexgen_bench.planner.rank_simulator import RankSimulator
from flexgen_bench.planner.simulated_lanes import Event
from flexgen_bench.schedule.steps import StepKind
from tests.support.planner_machines import (
    ACCELERATOR,
    EMULATED,
    HOST,
    PlannedJob,
    a_job,
    accelerator,
    jobs,
    model_of,
    small_opt,
)

CPU, GPU = Placement.all_on(Tier.CPU), Placement.all_on(Tier.GPU)
FOUR_LAYERS = small_opt(layers=4)
STREAMED = Policy(2, 1, CPU, CPU, CPU)
POLICIES = [
    STREAMED,
    Policy(2, 2, CPU, CPU, CPU, attention=AttentionSite.CPU),
    Policy(2, 2, Placement(gpu=0.5, cpu=0.5), GPU, GPU, prefill_chunk=8),
    Policy(4, 1, CPU, CPU, CPU, schedule=Schedule.CONTINUOUS),
]

NAMES = ["streamed", "attended by the cpu", "half resident", "continuous"]


def plans_of(job: PlannedJob, stages: tuple[Stage, ...]) -> tuple[MemoryPlan, ...]:
    model = model_of(job.shape, job.policy.lossy)
    return tuple(plan_job(model, job.policy, job.hardware, job.requests, stage=stage) for stage in stages)


def over(job: PlannedJob, ranks: int, *, keep: bool = False, points: int | None = None) -> RankForecast:
    """All rounds simulated unless ``points`` says otherwise."""
    plans = plans_of(job, even_stages(job.shape.num_layers, ranks))
    return rank_forecast(plans, points=points, keep=keep)


@given(jobs(most_sequences=4, longest=3))
@settings(max_examples=10, deadline=None)
def test_one_rank_is_simulated_as_ever(job: PlannedJob) -> None:
    alone, one = job.forecast(points=None), rank_forecast([job.plan], points=None)
    assert one.total_s == pytest.approx(alone.total_s, rel=1e-9)
    assert [p.seconds for p in one.times.passes] == pytest.approx([p.seconds for p in alone.passes], rel=1e-9)
    assert one.times.steps == alone.steps


@given(jobs(most_sequences=5, longest=3), st.integers(2, 4))
@settings(max_examples=10, deadline=None)
def test_ranks_take_no_longer_than_all_of_their_steps_in_a_row(job: PlannedJob, ranks: int) -> None:
    """Whatever the policy: everything is done, once, and nobody waits for what never comes."""
    if job.shape.num_layers < ranks:
        job = replace(job, shape=replace(job.shape, num_layers=ranks))
    plans = plans_of(job, even_stages(job.shape.num_layers, ranks))
    simulated = rank_forecast(plans, points=None, keep=True)
    simulator = RankSimulator(plans)
    in_a_row = sum(simulator.seconds(event.step) for event in simulated.times.events)
    assert simulated.total_s <= in_a_row * (1 + 1e-9)
    assert len(simulated.times.events) == simulated.times.steps


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_lanes_are_busy_for_as_long_as_their_steps_take(policy: Policy) -> None:
    """Of a machine where the host issues in no time and no two lanes share a link at once."""
    simulated = over(a_job(policy, accelerator(), FOUR_LAYERS), 2, keep=True)
    busy, moved = defaultdict[Lane, float](float), defaultdict[Lane, int](int)
    for event in simulated.times.events:
        busy[event.step.lane] += event.end_s - event.begin_s
        moved[event.step.lane] += event.step.bytes
    assert simulated.times.busy_s() == pytest.approx(busy)
    assert simulated.times.moved_bytes() == moved
    for rank in range(2):
        own = simulated.of_rank(rank).busy_s()
        assert own == pytest.approx({Lane(lane.kind): s for lane, s in busy.items() if lane.device == rank})
        assert simulated.bubble(rank) == pytest.approx(1 - own[Lane.GPU] / simulated.total_s)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
def test_messages_are_received_when_they_have_been_sent(policy: Policy, overlap: bool) -> None:
    """Of every micro-batch of every pass, by the next rank, and its tokens by all; none twice."""
    job = a_job(replace(policy, overlap=overlap), ACCELERATOR, FOUR_LAYERS, prompts=12)
    events = over(job, 3, keep=True).times.events
    for rank in range(2):
        sent = _by_micro_batch(events, StepKind.SEND_HIDDEN, rank)
        received = _by_micro_batch(events, StepKind.RECV_HIDDEN, rank + 1)
        chosen = _by_micro_batch(events, StepKind.SEND_TOKENS, 2)
        told = _by_micro_batch(events, StepKind.RECV_TOKENS, rank)
        for first, then in ((sent, received), (chosen, told)):
            assert {key: len(found) for key, found in first.items()} == {key: len(found) for key, found in then.items()}
            for key, found in first.items():
                pairs = zip(found, then[key], strict=True)
                assert all(one.end_s <= other.begin_s + 1e-12 for one, other in pairs), key


def _by_micro_batch(events: tuple[Event, ...], kind: StepKind, rank: int) -> dict[object, list[Event]]:
    found: defaultdict[object, list[Event]] = defaultdict(list)
    for event in events:
        step = event.step
        if step.kind is kind and step.lane.device == rank:
            members = tuple((m.group.index, m.token, m.start) for m in step.micro_batch.members)
            found[members].append(event)
    return found


def test_every_rank_gets_the_micro_batches_in_the_order_of_the_passes() -> None:
    """Waves in turn, and what a wave computes only once all have its last tokens."""
    events = over(a_job(STREAMED, ACCELERATOR, FOUR_LAYERS, prompts=12), 2, keep=True).times.events
    for rank in range(2):
        layer = 1 + 2 * rank
        computed = [e for e in events if e.step.kind is StepKind.PROJECT and e.step.unit == layer]
        waves = [e.step.micro_batch.members[0].group.kv_slot for e in sorted(computed, key=lambda e: e.begin_s)]
        assert waves == [0, 1] * (len(waves) // 2)
    embedded = [e for e in events if e.step.kind is StepKind.EMBED]
    told = {key: found[0].end_s for key, found in _by_micro_batch(events, StepKind.RECV_TOKENS, 0).items()}
    for event in embedded:
        member = event.step.micro_batch.members[0]
        if member.token:
            assert told[((member.group.index, member.token - 1, 0),)] <= event.begin_s + 1e-12


@pytest.mark.parametrize("policy", POLICIES, ids=NAMES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_few_rounds_tell_the_others(policy: Policy, ranks: int) -> None:
    """Of a continuous job as short as this hardly two rounds are alike."""
    error = 0.03 if policy.schedule is Schedule.BLOCK else 0.06
    job = a_job(policy, ACCELERATOR, FOUR_LAYERS, prompts=24, gen_len=24)
    every, few = over(job, ranks), over(job, ranks, points=POINTS)
    assert few.times.steps < every.times.steps
    assert few.total_s == pytest.approx(every.total_s, rel=error)
    for rank in range(ranks):
        assert few.bubble(rank) == pytest.approx(every.bubble(rank), abs=3 * error)


def test_a_pipeline_that_is_full_is_as_fast_as_its_ranks() -> None:
    """What a policy is looked for by: a rank alone, to which everything comes in time."""
    job = a_job(Policy(4, 1, GPU, GPU, GPU), ACCELERATOR, small_opt(layers=8, hidden=256), prompts=16, gen_len=32)
    plans = plans_of(job, even_stages(8, 4))
    alone, together = forecast(plans[-1]), rank_forecast(plans)
    assert len(alone.passes) == 4 * len(together.times.passes)
    filling_s = 3 * alone.passes[0].seconds
    assert together.total_s == pytest.approx(alone.total_s + filling_s, rel=0.1)


def test_a_slower_rank_is_named_and_the_others_wait_for_it() -> None:
    job = a_job(STREAMED, ACCELERATOR, small_opt(layers=6, hidden=256), prompts=12, gen_len=8)
    plans = plans_of(job, stages_of([1, 4, 1], 6))
    found = rank_forecast(plans, points=None)
    assert found.slowest == 1
    assert max(found.busy_shares(1).values()) > 1.5 * max(found.busy_shares(0).values())
    assert all(found.bubble(rank) >= found.bubble(1) for rank in (0, 2))


def test_a_slow_network_is_what_a_pipeline_waits_for() -> None:
    fast = over(a_job(STREAMED, accelerator(net_out=1e12, net_in=1e12), FOUR_LAYERS), 2)
    slow = over(a_job(STREAMED, accelerator(net_out=2e5, net_in=1e12), FOUR_LAYERS), 2)
    assert slow.total_s > 2 * fast.total_s
    assert slow.busy_shares(0)[Lane(LaneKind.NET_OUT)] > 0.8
    # A message is received while it is sent: a link that receives at the same rate adds nothing.
    both = over(a_job(STREAMED, accelerator(net_out=2e5, net_in=2e5), FOUR_LAYERS), 2)
    assert both.total_s == pytest.approx(slow.total_s, rel=1e-6)


def test_ranks_of_one_machine_share_its_disk() -> None:
    on_disk = replace(STREAMED, weights=Placement.all_on(Tier.DISK))
    job = a_job(on_disk, accelerator(disk_read=1e8), FOUR_LAYERS, prompts=8, gen_len=8)
    plans = plans_of(job, even_stages(4, 2))
    machines = [RankMachine(job.hardware, host) for host in (0, 1)]
    apart, together = (rank_forecast(plans, ranks) for ranks in (machines, [machines[0]] * 2))
    assert together.total_s == pytest.approx(2 * apart.total_s, rel=0.1)


def test_ranks_of_one_machine_share_its_memory_and_cores() -> None:
    host = in_one_machine(HOST, 4)[0].hardware
    assert HOST.rates is not None
    assert host.rates is not None
    assert host.cpu_memory_bytes == HOST.cpu_memory_bytes // 4  # type: ignore[operator]
    assert host.rates.sites[Tier.CPU].memory == HOST.rates.sites[Tier.CPU].memory / 4
    card = in_one_machine(ACCELERATOR, 4)[0].hardware
    assert ACCELERATOR.rates is not None
    assert card.rates is not None
    assert card.gpu_memory_bytes == ACCELERATOR.gpu_memory_bytes
    assert card.rates.sites[Tier.GPU] == ACCELERATOR.rates.sites[Tier.GPU]
    assert in_one_machine(EMULATED, 1)[0].hardware == EMULATED
