"""A micro-batch that is attended to in several places: where its caches lie, and the steps of a pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.models.model import Model
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.schedule.scheduler import Scheduler
from flexgen_bench.schedule.sequence_group import Span
from flexgen_bench.schedule.sequence_groups import Request
from flexgen_bench.schedule.steps import Step, StepKind
from tests.support.shapes import opt_shape

LAYERS = 3
MODEL = Model.of(opt_shape(num_layers=LAYERS), DType.FLOAT32)
EMULATED = HardwareProfile("emulated", Accelerator.EMULATED, gpu_memory_bytes=2**30)
GPU, HOST = Placement(gpu=1), Placement(cpu=1)
MOVED, DELEGATED = AttentionSite.COMPUTE, AttentionSite.CPU


def policy(size: int, count: int, kv: Placement, moved: float, **changes: object) -> Policy:
    base = Policy(size, count, HOST, kv, GPU, attention=AttentionSite.CPU, kv_moved=moved)
    return replace(base, **changes)  # type: ignore[arg-type]


def planned(chosen: Policy, requests: list[Request]) -> MemoryPlan:
    return plan_job(MODEL, chosen, EMULATED, requests)


def passes(chosen: Policy, requests: list[Request]) -> list[list[Step]]:
    scheduler = Scheduler(chosen, planned(chosen, requests))
    found = []
    while not scheduler.is_done:
        found.append(list(scheduler.steps(scheduler.schedule())))
        scheduler.postprocess()
    return found


def test_a_cache_in_host_memory_is_cut_by_where_it_is_attended_to() -> None:
    """What is on the accelerator stays in one piece, and so does what is on disk, which the cpu attends to."""
    (slot,) = planned(policy(12, 1, Placement(0.25, 0.5, 0.25), 0.5), [Request(3, 3)] * 12).groups.kv_slots
    assert slot.kv == (
        Span(Tier.GPU, 0, 3),
        Span(Tier.CPU, 3, 6, MOVED),
        Span(Tier.CPU, 6, 9, DELEGATED),
        Span(Tier.DISK, 9, 12, DELEGATED),
    )


def test_shares_come_out_over_a_block() -> None:
    """A third of two sequences is none of them; of a block of nine micro-batches it is six."""
    slots = planned(policy(2, 9, HOST, 1 / 3), [Request(3, 3)] * 18).groups.kv_slots
    moved = [span.count for slot in slots for span in slot.kv if span.attention is MOVED]
    assert sum(moved) == 6
    assert all(slot.size == 2 for slot in slots)


def test_products_are_of_all_and_attention_is_of_parts() -> None:
    """One projection and one output for a micro-batch in a layer, whatever attends to its parts; what joins them reads
    them all."""
    chosen = policy(6, 2, Placement(gpu=1 / 3, cpu=2 / 3), 0.5)
    decode = passes(chosen, [Request(3, 3)] * 12)[1]
    mine = [s for s in decode if not s.on_weights and s.unit == 2]
    kinds = Counter((s.kind, s.lane) for s in mine)
    assert kinds[StepKind.PROJECT, Lane.GPU] == kinds[StepKind.OUTPUT, Lane.GPU] == 2
    assert all(s.micro_batch.rows == 6 for s in mine)
    assert kinds[StepKind.ATTEND, Lane.GPU] == 4  # resident, and moved
    assert kinds[StepKind.ATTEND, Lane.CPU] == kinds[StepKind.MOVE_ATTENTION, Lane.H2D] == 2
    assert kinds[StepKind.LOAD_KV, Lane.H2D] == 2
    for output in (s for s in mine if s.kind is StepKind.OUTPUT):
        assert {output.micro_batch.buffer("attn", part) for part in range(3)} <= set(output.reads)


def test_the_link_brings_the_next_cache_while_the_cpu_attends() -> None:
    """What is moved comes before what the cpu made of the same micro-batch, and after the cpu has been given its part:
    in another order the link, which does one thing after the other, would wait for the cpu with the next micro-batch's
    cache behind it. Staging buffers of caches are taken in turn, though every second part of the pass needs none."""
    decode = passes(policy(4, 2, HOST, 0.5), [Request(3, 4)] * 8)[2]
    on_link = [(s.kind, s.unit, s.micro_batch_index) for s in decode if s.lane is Lane.H2D and 0 < s.unit <= LAYERS]
    load, back = StepKind.LOAD_KV, StepKind.MOVE_ATTENTION
    assert on_link == [(kind, layer, n) for layer in (1, 2, 3) for n in (0, 1) for kind in (load, back)]
    loads = [s for s in decode if s.kind is load]
    assert [s.micro_batch.kv_parts[s.part].kv_buffer for s in loads] == [0, 1] * LAYERS
    given = [(s.kind, s.unit, s.micro_batch_index) for s in decode if s.kind in (StepKind.MOVE_QKV, load)]
    for layer in (1, 2, 3):
        first_load = given.index((load, layer, 0))
        assert given.index((StepKind.MOVE_QKV, layer, 0)) < first_load


cases = st.tuples(
    st.builds(
        policy,
        st.integers(1, 4),
        st.integers(1, 4),
        st.sampled_from([HOST, Placement(0.4, 0.6), Placement(0.3, 0.4, 0.3)]),
        st.sampled_from([0.2, 0.5, 0.8]),
        weights=st.sampled_from([HOST, GPU, Placement(gpu=0.5, cpu=0.5)]),
        activations=st.sampled_from([HOST, GPU]),
        prefetch=st.integers(1, 3),
        schedule=st.sampled_from(Schedule),
        offloaded=st.sampled_from(Offloaded),
    ),
    st.lists(st.builds(Request, st.integers(1, 5), st.integers(2, 5)), min_size=1, max_size=9),
)


@given(cases)
@settings(max_examples=60, deadline=None)
def test_every_part_is_attended_to_once_where_it_is_said_to_be(case: tuple[Policy, list[Request]]) -> None:
    """In every layer of every decode pass, and by the layer's own device where that has the cache."""
    chosen, requests = case
    units = planned(chosen, requests).job.units
    for steps in passes(chosen, requests):
        attended: Counter[tuple[int, int, int]] = Counter()
        expected: set[tuple[int, int, int]] = set()
        for step in steps:
            if step.on_weights or step.micro_batch.is_prefill:
                continue
            parts = step.micro_batch.kv_parts
            if step.kind is StepKind.ATTEND:
                attended[step.unit, step.micro_batch_index, step.part] += 1
                site = units[step.unit].site
                delegated = parts[step.part].span.is_delegated
                assert step.lane is (site.cpu if delegated else site.lane)
            elif step.kind is StepKind.OUTPUT:
                expected |= {(step.unit, step.micro_batch_index, part.index) for part in parts}
        assert attended == dict.fromkeys(expected, 1)


@given(cases)
@settings(max_examples=60, deadline=None)
def test_both_kinds_of_staging_are_planned_where_there_are_both(case: tuple[Policy, list[Request]]) -> None:
    """No step names a staging buffer that the plan has no room for."""
    chosen, requests = case
    plan = planned(chosen, requests)
    staging, largest = plan.staging, 0
    for step in (step for steps in passes(chosen, requests) for step in steps):
        if step.on_weights:
            continue
        largest = max(largest, step.buffer_index)
        if step.kind is StepKind.LOAD_KV and step.lane is Lane.H2D:
            part = step.micro_batch.kv_parts[step.part]
            assert part.kv_buffer < staging.num_buffers
            assert step.bytes <= staging.kv_buffer
    assert largest < staging.num_buffers + staging.cpu_attention_buffers


@pytest.mark.parametrize("moved", [-0.1, 1, True, "half"])
def test_shares_that_are_none_are_refused(moved: object) -> None:
    with pytest.raises(UserError, match="kv_moved"):
        policy(2, 2, HOST, moved)  # type: ignore[arg-type]


def test_where_all_is_moved_there_is_nothing_to_divide() -> None:
    with pytest.raises(UserError, match="attention=cpu"):
        policy(2, 2, HOST, 0.5, attention=AttentionSite.COMPUTE)


def test_policies_without_it_read_as_they_did() -> None:
    plain = policy(2, 2, HOST, 0.0)
    assert "kv_moved" not in to_json(plain)
    assert from_json(Policy, to_json(plain), "policy") == plain
    divided = policy(2, 2, HOST, 0.25)
    assert from_json(Policy, to_json(divided), "policy") == divided
