"""What a plan counts, moves and prices of layers whose caches keep a window's tokens alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_bench.config.build import model_spec
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.score_mod import ScoreMod
from flexgen_bench.core.tiers import LaneKind, Site, Tier
from flexgen_bench.models.model import Model
from flexgen_bench.planner.batch_costs import micro_batch_cost
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.planner.rings import LayerKinds, ring_windows
from flexgen_bench.schedule.scheduler import Scheduler
from flexgen_bench.schedule.sequence_groups import Capacity, Request
from flexgen_bench.schedule.steps import Step, StepKind
from tests.support.planner_machines import accelerator

GEMMA = Model.of(model_spec("gemma-3-1b").shape, DType.FLOAT16)  # 22 of 26 layers have a window of 512
WINDOW, ROW = 512, 2 * 1 * 256 * 2  # K and V of one KV head of 256 values


def planned(prompt: int, new: int, kv: Tier) -> MemoryPlan:
    policy = Policy(4, 1, Placement.all_on(Tier.CPU), Placement.all_on(kv))
    return plan_job(GEMMA, policy, accelerator(), [Request(prompt, new)] * 4)


def loads(plan: MemoryPlan) -> list[list[Step]]:
    """What moves a cache to the accelerator, by pass."""
    found, scheduler = [], Scheduler(plan.policy, plan)
    while not scheduler.is_done:
        steps = scheduler.steps(scheduler.schedule())
        found.append([s for s in steps if s.kind is StepKind.LOAD_KV])
        scheduler.postprocess()
    return found


def test_at_8k_the_cache_of_gemma_3_is_that_of_its_four_layers_without_a_window() -> None:
    plan = planned(8000, 193, Tier.CPU)
    in_rings, whole = 22 * WINDOW * 4 * ROW, 4 * (8000 + 192) * 4 * ROW
    assert plan.bytes[Site.CPU]["kv_cache"] == pytest.approx(in_rings + whole, rel=0.01)
    assert plan.bytes[Site.CPU]["kv_cache"] < 26 * 8192 * 4 * ROW / 4
    # One layer at a time is on its way: one without a window.
    assert plan.bytes[Site.GPU]["kv slots"] == pytest.approx(2 * 8192 * 4 * ROW, rel=0.01)


@pytest.mark.parametrize(("prompt", "new"), [(40, 480), (450, 100), (600, 9)])
def test_no_more_is_moved_than_is_in_use(prompt: int, new: int) -> None:
    """Of a ring that fills, up to an eighth of it more; of the others prompt and segments, as ever."""
    plan = planned(prompt, new, Tier.CPU)
    units = plan.job.units
    for number, steps in enumerate(loads(plan)):
        assert len(steps) == (26 if number else 0)
        for step in steps:
            if units[step.unit].ring is not None:
                used = min(WINDOW, prompt + number) * 4 * ROW
                assert used <= step.bytes <= min(used + 64 * 4 * ROW, WINDOW * 4 * ROW)
            else:
                assert step.bytes >= (prompt + number - 1) * 4 * ROW


def test_where_no_window_is_left_nothing_changes() -> None:
    plan = planned(300, 213, Tier.CPU)  # 512 positions: the last token is never fed back
    assert plan.groups.rings == ()
    assert {u.ring for u in plan.job.units} == {None}
    assert planned(300, 214, Tier.CPU).groups.rings == (512,)


def test_with_alibi_everything_is_kept() -> None:
    """It wants distances."""
    layer = GEMMA.decoder.layers[0]
    sloped = replace(layer, attention=replace(layer.attention, mod=ScoreMod(window=512, slopes=(0.5,) * 4)))
    assert ring_windows(GEMMA.decoder) == {512}
    assert ring_windows(replace(GEMMA.decoder, layers=(*GEMMA.decoder.layers, sloped))) == set()


def test_on_disk_a_ring_is_read_and_written_in_whole_segments() -> None:
    plan = planned(3000, 200, Tier.DISK)
    in_rings, whole = 22 * WINDOW * 4 * ROW, 4 * (3000 + 199) * 4 * ROW
    assert plan.bytes[Site.DISK]["kv_cache"] == pytest.approx(in_rings + whole, rel=0.05)
    units, scheduler = plan.job.units, Scheduler(plan.policy, plan)
    read = written = 0
    while not scheduler.is_done:
        for step in scheduler.steps(scheduler.schedule()):
            if units[step.unit].ring is not None and step.lane.kind is LaneKind.DISK_READ:
                assert step.bytes <= WINDOW * 4 * ROW
                read += step.bytes
            if units[step.unit].ring is not None and step.lane.kind is LaneKind.DISK_WRITE:
                written += step.bytes
        scheduler.postprocess()
    assert read == 22 * 199 * WINDOW * 4 * ROW
    # The prompt's last tokens, and each later one once.
    assert 22 * (WINDOW + 128) * 4 * ROW <= written <= 22 * (WINDOW + 199) * 4 * ROW


def test_a_job_that_caches_nothing_has_no_rings() -> None:
    assert planned(3000, 1, Tier.CPU).groups.rings == ()
    policy = Policy(2, 1)
    scoring = plan_job(GEMMA, policy, accelerator(), [Request(3000, 1)] * 2, scored_rows=100)
    assert scoring.groups.rings == ()


def test_requests_of_an_open_job_take_no_more_than_was_planned() -> None:
    """Rings of short requests were in more segments, each of whole pages, than those of the capacity."""
    for kv in (Tier.GPU, Tier.CPU):
        policy = Policy(2, 1, kv_cache=Placement.all_on(kv))
        plan = plan_job(GEMMA, policy, accelerator(), Capacity(2, 4000, 300))
        slot = plan.groups.kv_slots[0]
        for prompt, new in ((1, 1), (1, 300), (30, 100), (500, 20), (600, 300), (4000, 1), (4000, 300)):
            group = plan.groups.start_request(5, Request(prompt, new), slot)
            for ring, sizes in plan.kv_slots[0].kv.items():
                assert group.laid_out(ring)[0].region_bytes <= sizes[0]


def test_a_micro_batch_costs_what_its_layers_cost() -> None:
    """One layer stood for all: the first one of Gemma 3 has a window, so those without were forgotten."""
    request = Request(4000, 8)
    policy = Policy(4, 1, Placement.all_on(Tier.CPU), Placement.all_on(Tier.CPU))
    kinds = LayerKinds.of(GEMMA, request)
    assert kinds.few == 6
    assert [kinds.times(n) for n in range(6)] == [22 / 5] * 5 + [4]
    assert kinds.cached(4007) == 22 * 512 + 4 * 4007
    assert LayerKinds.of(GEMMA, Request(400, 8)).few == 1
    cost = micro_batch_cost(GEMMA, policy, accelerator(), request)
    longer = Request(request.prompt_len + 4, 3)  # a decode pass half-way
    plan = plan_job(GEMMA, policy, accelerator(), [longer] * 4)
    lane = loads(plan)[1][0].lane
    moved = sum(step.bytes for step in loads(plan)[1])
    added = cost.decode.by_share["kv_cache", Tier.GPU][lane]
    rate = plan.hardware.link_rate(lane)
    assert rate is not None
    assert -added == pytest.approx(moved / rate, rel=0.02)
