"""Forecasts: passes that are read off instead of simulated, the closed form, deeper models, and bytes counted by
hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.policy import AttentionSite, Placement, Policy, Schedule
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.planner.forecast import forecast
from flexgen_bench.planner.memory_plan import plan_job
from flexgen_bench.planner.pass_kinds import POINTS, PassKind, mixes
from flexgen_bench.schedule.sequence_groups import Request
from tests.support.planner_machines import (
    ACCELERATOR,
    EMULATED,
    HOST,
    PlannedJob,
    a_job,
    accelerator,
    host,
    jobs,
    model_of,
    site,
    small_llama,
    small_opt,
)

GPU, CPU, DISK = (Placement.all_on(tier) for tier in Tier)
HALF = Placement(gpu=0.5, cpu=0.5)
LIKE = (Request(16, 24),) * 13
LONGER = tuple(Request(8 + 3 * i, 24) for i in range(13))
UNLIKE = tuple(Request(7, 4 + i % 5 * 5) for i in range(13))
DEEP = small_opt(layers=6, hidden=256)


def the_job(policy: Policy, hardware: HardwareProfile, requests: tuple[Request, ...] = LIKE) -> PlannedJob:
    return PlannedJob(DEEP, policy, hardware, requests)


CONTINUOUS, CHUNKED = Schedule.CONTINUOUS, 24
GRID = [
    the_job(Policy(4, 2, CPU, CPU, CPU), ACCELERATOR),
    the_job(Policy(4, 2, CPU, CPU, CPU, attention=AttentionSite.CPU), ACCELERATOR),
    the_job(Policy(4, 2, CPU, CPU, CPU, schedule=CONTINUOUS), ACCELERATOR),
    the_job(Policy(4, 2, HALF, HALF, GPU, prefill_chunk=CHUNKED), ACCELERATOR, LONGER),
    the_job(Policy(4, 2, DISK, HALF, CPU, schedule=CONTINUOUS), ACCELERATOR, UNLIKE),
    the_job(Policy(4, 2, CPU, DISK, CPU), ACCELERATOR),
    the_job(Policy(4, 2, CPU, CPU, CPU, schedule=CONTINUOUS), EMULATED),
    the_job(Policy(2, 3, HALF, CPU, CPU, attention=AttentionSite.CPU), EMULATED, LONGER),
    the_job(Policy(4, 2, DISK, CPU, CPU), HOST),
    the_job(Policy(4, 2, DISK, DISK, CPU), HOST, UNLIKE),
    the_job(Policy(4, 2, CPU, DISK, CPU, prefill_chunk=CHUNKED), HOST, LONGER),
    the_job(Policy(4, 2, CPU, CPU, CPU, schedule=CONTINUOUS), HOST, LONGER),
    the_job(Policy(1, 1, CPU, CPU, CPU), ACCELERATOR, (Request(30, 24),)),
    the_job(Policy(4, 2, CPU, CPU, CPU), ACCELERATOR, (Request(30, 1),) * 13),
]


@pytest.mark.parametrize("number", range(len(GRID)))
def test_what_is_read_off_is_what_would_have_been_played(number: int) -> None:
    """Total, prefill and decode apart, bytes and busy lanes."""
    job = GRID[number]
    every, few = job.forecast(points=None), job.forecast(points=POINTS)
    assert few.total_s == pytest.approx(every.total_s, rel=0.01)
    assert few.prefill_s == pytest.approx(every.prefill_s, rel=0.01)
    assert few.decode_s == pytest.approx(every.decode_s, rel=0.015)
    assert few.busy_s() == pytest.approx(every.busy_s(), abs=0.01 * every.total_s)
    moved = every.moved_bytes()
    assert few.moved_bytes() == pytest.approx(moved, abs=0.01 * sum(moved.values()))
    assert len(few.passes) == len(every.passes)
    assert few.steps <= every.steps


def test_continuous_cohorts_of_mixed_lengths_on_disk_are_read_off_roughly() -> None:
    """The hardest there is: every pass has prompts of another length, and the disk is behind for several passes."""
    policy = Policy(4, 2, CPU, DISK, CPU, schedule=CONTINUOUS, attention=AttentionSite.CPU)
    job = PlannedJob(small_opt(), policy, ACCELERATOR, LONGER)
    assert job.forecast(points=POINTS).total_s == pytest.approx(job.forecast().total_s, rel=0.07)


def test_a_pass_is_played_after_one_like_its_own() -> None:
    """It was simulated after the one that happened to be simulated before: a decode pass after a prefill whose caches
    the disk was still writing took 22 % too long, and with it everything that was read off it."""
    job = PlannedJob(small_opt(), Policy(4, 1, DISK, DISK, CPU), HOST, UNLIKE)
    every, few = job.forecast(points=None), job.forecast(points=POINTS)
    assert few.total_s == pytest.approx(every.total_s, rel=0.005)
    ratios = [a.seconds / b.seconds for a, b in zip(few.passes, every.passes, strict=True)]
    assert sum(abs(ratio - 1) < 0.01 for ratio in ratios) >= len(ratios) - 3


def test_few_passes_that_are_most_of_the_work_are_played() -> None:
    """4 prefills of 100 passes got one point, since they are few: with prompts of other lengths one was 30 % off."""
    job = PlannedJob(small_opt(), Policy(4, 1, DISK, CPU, CPU), HOST, LONGER)
    every, few = job.forecast(points=None), job.forecast(points=POINTS)
    assert few.prefill_s == pytest.approx(every.prefill_s, rel=0.01)
    kinds = [PassKind(("decode",), 1000 + n) for n in range(96)]
    kinds += [PassKind(("prefill",), 100_000 * (1 + n)) for n in range(4)]
    made_of = mixes(kinds)
    assert [made_of[n] for n in range(96, 100)] == [{n: 1.0} for n in range(96, 100)]


def test_passes_between_are_on_the_line() -> None:
    kinds = [PassKind(("decode",), amount) for amount in (10, 20, 30, 40)]
    assert mixes(kinds, 2) == [
        {0: 1.0},
        {0: pytest.approx(2 / 3), 3: pytest.approx(1 / 3)},
        {0: pytest.approx(1 / 3), 3: pytest.approx(2 / 3)},
        {3: 1.0},
    ]
    assert mixes(kinds, 1) == [{2: 1.0}] * 4
    apart = [PassKind(("a",), 5), PassKind(("b",), 5), PassKind(("a",), 5)]
    assert mixes(apart, 4) == [{0: 1.0}, {1: 1.0}, {0: 1.0}]


SLOW_LINK = accelerator(h2d=2e7)
SLOW_DISK = host(disk_read=1e7)
SLOW_GPU = accelerator(gpu=site(flops=2e9, memory=1e9), h2d=2e10, d2h=2e10)
QUIET = {
    "link": the_job(Policy(4, 2, CPU, GPU, GPU), SLOW_LINK),
    "link and caches": the_job(Policy(4, 2, CPU, CPU, GPU), accelerator(h2d=2e7, d2h=1e10)),
    "disk": the_job(Policy(4, 2, DISK, CPU, CPU), SLOW_DISK),
    "disk to accelerator": the_job(Policy(4, 2, DISK, GPU, GPU), accelerator(disk_read=1e7)),
    "computing": the_job(Policy(4, 2, CPU, GPU, GPU), SLOW_GPU),
    "resident": the_job(Policy(4, 2, GPU, GPU, GPU), accelerator(gpu=site(flops=1e10))),
    "host": the_job(Policy(4, 2, CPU, CPU, CPU), HOST, UNLIKE),
    "no overlap": the_job(Policy(4, 2, HALF, HALF, CPU, overlap=False), ACCELERATOR, LONGER),
    "no overlap, disk": the_job(Policy(4, 2, DISK, DISK, DISK, overlap=False), HOST),
}


@pytest.mark.parametrize("name", QUIET)
def test_the_closed_form_is_exact_where_one_thing_binds(name: str) -> None:
    """Within 3 % of what is simulated, and not above it."""
    job = QUIET[name]
    simulated, summed = job.forecast().total_s, job.closed_form().total_s
    assert summed == pytest.approx(simulated, rel=0.03)
    assert summed <= simulated * (1 + 1e-6)


@given(jobs(most_sequences=8, longest=6))
@settings(max_examples=120, deadline=None)
def test_the_closed_form_is_a_bound(job: PlannedJob) -> None:
    """Without overlap it is what is simulated. With it nothing beats it, but for what one pass does for another: loads
    of weights ahead of the next, or caches and hidden states that are written to disk while it computes. (Only short
    jobs of shallow models win much by
    that: a single layer, loaded while the pass before computes, is simulated in three quarters of the sum.)"""
    simulated, summed = job.forecast().total_s, job.closed_form().total_s
    if not job.policy.overlap:
        assert summed == pytest.approx(simulated)
    policy = job.policy
    on_disk = policy.kv_cache.disk + policy.activations.disk
    if not job.plan.job.streamed and not on_disk:
        assert summed <= simulated * (1 + 1e-6)


@pytest.mark.parametrize(
    "job",
    [
        PlannedJob(small_opt(), Policy(4, 1, CPU, DISK, CPU), HOST, (Request(16, 24),)),
        PlannedJob(small_opt(), Policy(4, 1, CPU, DISK, CPU), HOST, LIKE),
        PlannedJob(small_opt(), Policy(4, 1, CPU, DISK, CPU, schedule=CONTINUOUS), ACCELERATOR, LONGER),
        PlannedJob(small_opt(), Policy(4, 1, HALF, HALF, CPU, attention=AttentionSite.CPU), ACCELERATOR, LIKE),
    ],
)
def test_the_closed_form_does_not_add_what_goes_on_at_once(job: PlannedJob) -> None:
    """All steps of a micro-batch were taken for a chain, also those that nobody waits for or that run ahead (stores and
    loads of its cache) and parts that lie on different tiers: up to 43 % above what is simulated."""
    assert job.closed_form().total_s <= job.forecast().total_s * (1 + 1e-6)


def test_a_head_has_a_slot_of_its_own() -> None:
    """Its loads and its product were counted among those of the layers' slots, and a load over two links twice; it is
    in pieces, of which one is loaded while another moves on."""
    shape = small_opt(layers=2, vocab=4096)
    for policy, machine in (
        (Policy(4, 2, DISK, GPU, GPU, prefetch=1), accelerator(disk_read=5e8, h2d=5e8)),
        (Policy(4, 2, DISK, CPU, CPU, prefetch=1), HOST),
    ):
        job = PlannedJob(shape, policy, machine, LIKE)
        assert job.closed_form().total_s <= job.forecast().total_s * (1 + 1e-6)


@pytest.mark.parametrize(
    ("policy", "hardware"),
    [
        (Policy(4, 2, CPU, CPU, CPU), ACCELERATOR),
        (Policy(4, 2, CPU, CPU, GPU, attention=AttentionSite.CPU), ACCELERATOR),
        (Policy(4, 2, CPU, HALF, CPU, schedule=CONTINUOUS), EMULATED),
        (Policy(4, 2, DISK, CPU, CPU), HOST),
        (Policy(4, 2, CPU, CPU, CPU), HOST),
        (Policy(4, 2, CPU, CPU, CPU, overlap=False), ACCELERATOR),
    ],
)
@pytest.mark.parametrize("make", [small_opt, small_llama])
def test_a_deep_model_is_as_many_shallow_ones(policy: Policy, hardware: HardwareProfile, make: object) -> None:
    """12 layers stand for 36: embedding and head are not repeated, nor are the loads of the head's weights. (They were:
    with a large vocabulary a deep model that is bound by its link took up to 9 % too long.)"""
    assert make in (small_opt, small_llama)
    shape = (small_opt if make is small_opt else small_llama)(layers=36, vocab=2048)
    requests = (Request(16, 4),) * 16
    deep = PlannedJob(shape, policy, hardware, requests)
    thin = model_of(shape).shallow(12)
    shallow = PlannedJob(thin.shape, policy, hardware, requests)
    found = shallow.forecast().deeper(3, policy.overlap)
    expected = deep.forecast()
    assert found.total_s == pytest.approx(expected.total_s, rel=0.02)
    assert found.moved_bytes() == pytest.approx(expected.moved_bytes(), rel=1e-6)
    assert found.busy_s() == pytest.approx(expected.busy_s(), abs=0.02 * expected.total_s)
    assert [u.kind for u in thin.packed.units] == [u.kind for u in model_of(shallow.shape).packed.units]
    assert model_of(shape).shallow(36) == model_of(shape)


@pytest.mark.xfail(reason="a shallow model's embedding takes a larger part of the same share", strict=False)
def test_a_shallow_model_keeps_the_share_of_layers_that_are_resident() -> None:
    """Half of a model whose embedding is as large as 5 layers: 7 of 12 layers are streamed where 20 of 36 are."""
    shape = small_opt(layers=36, vocab=4096)
    requests = (Request(16, 4),) * 16
    deep = PlannedJob(shape, Policy(4, 2, HALF, GPU, GPU), accelerator(h2d=2e7), requests)
    shallow = replace(deep, shape=model_of(shape).shallow(12).shape)
    assert shallow.forecast().deeper(3).total_s == pytest.approx(deep.forecast().total_s, rel=0.02)


def test_a_thin_model_is_the_deep_ones_first_layers() -> None:
    """Simulated from the cut-down weights, it takes as long as if it had been packed that way."""
    shape = small_llama(layers=6)
    thin = model_of(shape).shallow(2)
    job = a_job(Policy(4, 2, CPU, CPU, CPU), shape=thin.shape)
    found = forecast(plan_job(thin, job.policy, job.hardware, job.requests), points=None)
    assert found.total_s == pytest.approx(job.forecast().total_s, rel=1e-6)


def moved(job: PlannedJob, source: Tier, target: Tier) -> int:
    """Bytes between two tiers, over whichever lanes."""
    found = job.forecast().moved_bytes()
    return sum(found[lane] for lane in found if lane.ends == (source, target))


def test_bytes_are_those_counted_by_hand() -> None:
    """8 prompts of 16 tokens, 4 new tokens each, in one block of two micro-batches: 4 passes. Everything but the
    weights stays."""
    job = a_job(Policy(4, 2, CPU, GPU, GPU))
    layer, head = job.plan.model.packed.units[1].num_bytes, job.plan.model.packed.head.num_bytes
    rows = 8 * 16 + 3 * 8
    embedded = rows * 2 * 64 * 2  # rows of the token and position tables
    passes = 4
    # The embedding's own weights are none in this OPT.
    assert job.plan.model.packed.units[0].num_bytes == 0
    assert moved(job, Tier.CPU, Tier.GPU) == passes * (3 * layer + head) + embedded
    assert moved(job, Tier.GPU, Tier.CPU) == passes * 8 * 8  # a row's logits: what sampling needs
    assert moved(job, Tier.DISK, Tier.CPU) == moved(job, Tier.CPU, Tier.DISK) == 0


def test_a_second_block_loads_the_weights_again() -> None:
    one, two = (a_job(Policy(4, 1, CPU, GPU, GPU), prompts=n) for n in (4, 8))
    assert moved(two, Tier.CPU, Tier.GPU) == 2 * moved(one, Tier.CPU, Tier.GPU)
    shared = a_job(Policy(4, 2, CPU, GPU, GPU))
    weights = 4 * (3 * shared.plan.model.packed.units[1].num_bytes + shared.plan.model.packed.head.num_bytes)
    assert moved(two, Tier.CPU, Tier.GPU) - moved(shared, Tier.CPU, Tier.GPU) == weights


def test_hidden_states_and_caches_counted_by_hand() -> None:
    """In host memory: hidden states go up and down around each of 3 layers, up to the head and down from the embedding;
    a prompt's cache goes down once, all of it comes up for every token, and the token's goes down."""
    weights = {"weights": GPU}
    base = a_job(replace(Policy(4, 1, CPU, GPU, GPU), **weights), prompts=4)  # type: ignore[arg-type]
    hidden = replace(base, policy=replace(base.policy, activations=CPU))
    row = 64 * 2
    rows = 4 * 16 + 3 * 4
    up = moved(hidden, Tier.CPU, Tier.GPU) - moved(base, Tier.CPU, Tier.GPU)
    down = moved(hidden, Tier.GPU, Tier.CPU) - moved(base, Tier.GPU, Tier.CPU)
    assert up == down == (3 + 1) * rows * row
    caches = replace(base, policy=replace(base.policy, kv_cache=CPU))
    token = 2 * 64 * 2
    prompt = 4 * 16 * token
    up = moved(caches, Tier.CPU, Tier.GPU) - moved(base, Tier.CPU, Tier.GPU)
    down = moved(caches, Tier.GPU, Tier.CPU) - moved(base, Tier.GPU, Tier.CPU)
    assert down == 3 * (prompt + 3 * 4 * token)
    # Tails of one token each are whole pages; none before the first new token, then one and two.
    page = 4096
    assert prompt % page == 0
    assert up == 3 * (3 * prompt + (0 + 1 + 2) * page)


def test_a_job_of_one_token_each_has_no_decode() -> None:
    job = a_job(Policy(4, 2, CPU, CPU, GPU), gen_len=1)
    found = job.forecast()
    assert len(found.passes) == 1
    assert found.decode_s == 0 < found.prefill_s == found.total_s
    assert moved(job, Tier.GPU, Tier.CPU) == 8 * 8  # nothing is cached
    assert job.closed_form().total_s <= found.total_s


def test_prefill_is_what_passes_of_prompts_take() -> None:
    """Two blocks of 4 passes each; in the continuous schedule only the first pass has nobody who decodes."""
    job = a_job(Policy(4, 1, CPU, CPU, CPU))
    found = job.forecast()
    assert [p.is_prefill for p in found.passes] == [True, False, False, False] * 2
    assert found.prefill_s == pytest.approx(found.passes[0].seconds + found.passes[4].seconds)
    continuous = a_job(Policy(4, 1, CPU, CPU, CPU, schedule=CONTINUOUS)).forecast()
    assert [p.is_prefill for p in continuous.passes] == [True] + [False] * (len(continuous.passes) - 1)
    busy = found.busy_s()
    assert max(busy.values()) <= found.total_s
    assert Lane.DISK_READ not in busy


def test_events_are_kept_if_wanted() -> None:
    job = a_job(Policy(4, 1, CPU, CPU, CPU))
    assert job.forecast().events == ()
    kept = job.forecast(keep=True)
    last = max(e.end_s for e in kept.events if e.step.lane in (Lane.CPU, Lane.GPU))
    assert last == pytest.approx(kept.total_s)
    assert kept.steps == len([s for one in job.passes(job.plan) for s in one])
