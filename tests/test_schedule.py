"""The step generator: whatever order the derived dependencies allow must compute what program order computes."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_bench.core.policy import AttentionSite
from flexgen_bench.core.tiers import LINKS, Lane, Tier
from flexgen_bench.schedule.dependencies import DependencyTracker
from flexgen_bench.schedule.generator import pass_steps
from flexgen_bench.schedule.job import (
    Job,
    KVLayout,
    MicroBatch,
    Span,
    Unit,
    UnitKind,
    Work,
)
from flexgen_bench.schedule.steps import Buffer, Step, StepKind
from flexgen_bench.schedule.weights import WeightStream

LAYERS = 3


@st.composite
def spans(draw: st.DrawFn, count: int, tiers: tuple[Tier, ...]) -> tuple[Span, ...]:
    cuts = sorted(
        draw(st.lists(st.integers(0, count), min_size=len(tiers) - 1, max_size=len(tiers) - 1))
    )
    edges = [0, *cuts, count]
    pieces = zip(tiers, edges, edges[1:], strict=False)
    return tuple(Span(tier, start, stop) for tier, start, stop in pieces if stop > start)


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    accelerator = draw(st.booleans())
    tiers = tuple(Tier) if accelerator else (Tier.CPU, Tier.DISK)
    compute = tiers[0]
    kinds = [UnitKind.EMBED, *[UnitKind.LAYER] * LAYERS, UnitKind.HEAD]
    units = tuple(
        Unit(
            i, kind, draw(st.sampled_from(tiers)), draw(st.sampled_from([0, 10])) if i == 0 else 10
        )
        for i, kind in enumerate(kinds)
    )
    gen_len = draw(st.integers(1, 4))
    batches, layouts = [], []
    for index in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 3))
        batch = MicroBatch(
            index, tuple(range(size)), tuple(draw(st.integers(1, 5)) for _ in range(size)), gen_len,
            draw(spans(size, tiers)), draw(spans(size, tiers)),
        )  # fmt: skip
        batches.append(batch)
        segment = draw(st.integers(1, 3))
        layouts.append(
            tuple(KVLayout(s.count, batch.padded_len, gen_len - 1, segment, 8) for s in batch.kv)
        )
    slots = draw(st.integers(1, 3))
    return Job(
        units=units, batches=tuple(batches), compute_tier=compute,
        attention=draw(st.sampled_from(AttentionSite)), weight_slots=slots, host_slots=slots,
        stages=max(2, slots), hidden_row_bytes=4, embed_row_bytes=4, qkv_row_bytes=12,
        attention_row_bytes=4, logits_row_bytes=8, attention_flops_per_pair=2,
        kv_layouts=tuple(layouts), keep_kv=gen_len > 1,
    )  # fmt: skip


def all_steps(job: Job) -> list[Step]:
    """Every step of a job of one block, passes in order; micro-batches that end early leave."""
    weights = WeightStream(job)
    steps = []
    passes = max(b.gen_len for b in job.batches)
    for token in range(passes):
        active = [b for b in job.batches if b.index % 2 == 0 or token < 2]
        work = [Work(b, token, place % job.stages) for place, b in enumerate(active)]
        steps += list(pass_steps(job, weights, token, work, token == passes - 1))
    return steps


def meaning(steps: list[Step]) -> list[tuple[object, ...]]:
    """What each step would read if they ran in this order: for every buffer, which step wrote it last."""
    written: dict[Buffer, int] = {}
    seen: dict[int, tuple[object, ...]] = {}
    for step in steps:
        touched = (*step.reads, *step.writes)
        seen[id(step)] = tuple(written.get(buffer) for buffer in touched)
        for buffer in step.writes:
            written[buffer] = id(step)
    return [seen[key] for key in sorted(seen)]


def any_legal_order(steps: list[Step], rng: random.Random) -> list[Step]:
    """Run the lanes at random speeds, respecting only lane order and derived dependencies."""
    tracker = DependencyTracker()
    queues: dict[Lane, deque[tuple[Step, int, dict[Lane, int]]]] = {lane: deque() for lane in Lane}
    for step in steps:
        number, waits = tracker.add(step)
        queues[step.lane].append((step, number, waits))
    done = dict.fromkeys(Lane, 0)
    order = []
    while any(queues.values()):
        ready = [
            lane
            for lane, queue in queues.items()
            if queue and all(done[other] >= n for other, n in queue[0][2].items())
        ]
        assert ready, "deadlock: no lane can go on"
        lane = rng.choice(ready)
        step, number, _ = queues[lane].popleft()
        done[lane] = number
        order.append(step)
    return order


@given(jobs(), st.integers(0, 10**6))
@settings(max_examples=120, deadline=None)
def test_every_legal_order_means_the_same(job: Job, seed: int) -> None:
    steps = all_steps(job)
    order = any_legal_order(steps, random.Random(seed))
    assert len(order) == len(steps)
    assert meaning(order) == meaning(steps)


@given(jobs())
@settings(max_examples=60, deadline=None)
def test_staged_units_are_loaded_before_use_once_per_pass(job: Job) -> None:
    """A compute step that names a slot finds its own unit there, and every streamed unit is loaded once a pass."""
    into = Lane.H2D if job.has_accelerator else Lane.DISK_READ
    slots: dict[int, int] = {}
    loads = dict.fromkeys([u.index for u in job.streamed], 0)
    for step in all_steps(job):
        if step.kind is StepKind.LOAD_WEIGHTS and step.lane is into:
            slots[step.slot] = step.unit
            loads[step.unit] += 1
        elif step.kind in (StepKind.EMBED, StepKind.PROJECT, StepKind.OUTPUT, StepKind.HEAD):
            assert (step.slot >= 0) == (step.unit in loads)
            if step.slot >= 0:
                assert slots[step.slot] == step.unit
    passes = max(b.gen_len for b in job.batches)
    assert set(loads.values()) <= {passes}


@given(jobs())
@settings(max_examples=60, deadline=None)
def test_only_links_move_bytes_and_every_layer_is_computed(job: Job) -> None:
    steps = all_steps(job)
    assert all(step.bytes == 0 for step in steps if step.lane not in LINKS)
    used = {step.lane for step in steps}
    assert job.has_accelerator or used <= {Lane.CPU, Lane.DISK_READ, Lane.DISK_WRITE}
    for batch in job.batches:
        outputs = [
            s for s in steps if s.kind is StepKind.OUTPUT and s.batch == batch.index and not s.token
        ]
        assert [s.unit for s in outputs] == list(range(1, LAYERS + 1))


def test_a_slot_is_not_overwritten_while_it_is_used() -> None:
    """Write-after-read: with one slot, the second load waits for the first unit's last compute step."""
    tracker = DependencyTracker()
    slot = Buffer("weights", 0)
    tracker.add(Step(Lane.DISK_READ, StepKind.LOAD_WEIGHTS, 1, writes=(slot,)))
    assert tracker.add(Step(Lane.CPU, StepKind.PROJECT, 1, reads=(slot,))) == (
        1,
        {Lane.DISK_READ: 1},
    )
    assert tracker.add(Step(Lane.CPU, StepKind.OUTPUT, 1, reads=(slot,))) == (
        2,
        {Lane.DISK_READ: 1},
    )
    assert tracker.add(Step(Lane.DISK_READ, StepKind.LOAD_WEIGHTS, 2, writes=(slot,))) == (
        2,
        {Lane.CPU: 2},
    )


def test_loads_run_ahead_over_the_end_of_a_pass_but_not_over_the_end_of_the_job() -> None:
    units = tuple(
        Unit(i, kind, Tier.DISK, 0 if i == 0 else 10)
        for i, kind in enumerate([UnitKind.EMBED, UnitKind.LAYER, UnitKind.LAYER, UnitKind.HEAD])
    )
    batch = MicroBatch(0, (0,), (2,), 2, (Span(Tier.CPU, 0, 1),), (Span(Tier.CPU, 0, 1),))
    layout = KVLayout(1, 2, 1, 1, 8)
    job = Job(
        units, (batch,), Tier.CPU, AttentionSite.COMPUTE, 2, 2, 2, 4, 4, 12, 4, 8, 2, ((layout,),)
    )
    weights = WeightStream(job)
    passes = [
        [
            s.unit
            for s in pass_steps(job, weights, n, [Work(batch, n, 0)], n == 1)
            if s.kind is StepKind.LOAD_WEIGHTS
        ]
        for n in range(2)
    ]
    assert passes == [[1, 2, 3, 1], [2, 3]]


@pytest.mark.parametrize(("tokens", "full", "used"), [(0, 0, 0), (1, 0, 1), (4, 1, 1), (5, 1, 2)])
def test_kv_segments(tokens: int, full: int, used: int) -> None:
    layout = KVLayout(2, 3, 9, 4, 16)
    assert layout.full_segments(tokens) == full
    assert layout.used_segments(tokens) == used
    assert layout.region_bytes == layout.prefix_bytes(layout.num_segments)
    assert layout.prompt_bytes % 4096 == 0
