"""A cache that is attended to in several places, as the planner sees it: times, bounds, and what a search finds."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest

from flexgen_bench.core.compression import EXACT
from flexgen_bench.core.job import Job
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.planner.candidates import DIVIDED, Candidates
from flexgen_bench.planner.evaluator import Evaluator
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.planner.neighbours import neighbours
from flexgen_bench.planner.placement_lp import MOVED
from flexgen_bench.planner.search import Search
from flexgen_bench.planner.search_space import SearchSpace
from flexgen_bench.planner.why import why
from flexgen_bench.schedule.sequence_groups import Request
from tests.planner.test_search import model
from tests.support.planner_machines import DTYPE, MIB, accelerator, model_of, site

CPU = Placement.all_on(Tier.CPU)
SHAPE = model(16)
# The cpu attends to a gigabyte in a second, and a link moves as much. The accelerator has no room for 6 MB of weights;
# 64 sequences of 96 tokens have 50 MB of cache. The cpu alone is as long at it as the link at eight loads of weights.
MACHINE = accelerator(int(5.5 * MIB), 2**30, gpu=site(1e13, 1e12), cpu=site(1e12, 2e9), h2d=1e9, d2h=1e9)
SPACE = SearchSpace(Job(SHAPE, DTYPE, MACHINE, 64, 32, 64), (EXACT,))
PLAIN = Policy(8, 8, CPU, CPU, CPU, attention=AttentionSite.CPU, prefill_chunk=128)


def plan_of(policy: Policy) -> MemoryPlan:
    """Of 6 sequences."""
    return plan_job(model_of(SHAPE), policy, MACHINE, [Request(64, 32)] * 6)


def test_the_link_and_the_cpu_have_a_part_each() -> None:
    """Less of the cache than the cpu attends to is moved, as the link has the weights, too."""
    evaluator = Evaluator(SPACE)
    alone = [evaluator.tok_per_s(one) for one in (PLAIN, replace(PLAIN, attention=AttentionSite.COMPUTE))]
    divided = evaluator.tok_per_s(replace(PLAIN, kv_moved=0.4))
    assert divided > 1.4 * max(alone)


def test_moving_costs_what_it_costs_where_all_is_moved() -> None:
    """The program's seconds of a divided cache are those of the two pure ways at its ends."""
    solver = Candidates(SPACE)
    problem = next(iter(solver.problems(replace(PLAIN, kv_moved=DIVIDED))))
    delegated = next(iter(solver.problems(PLAIN)))
    moved = next(iter(solver.problems(replace(PLAIN, attention=AttentionSite.COMPUTE))))
    assert problem.may_divide
    assert not delegated.may_divide
    for lane in (Lane.CPU, Lane.H2D, Lane.D2H, Lane.GPU):
        fixed = problem.decode.fixed.get(lane, 0.0)
        assert fixed == pytest.approx(delegated.decode.fixed.get(lane, 0.0))
        assert fixed + problem.decode.by_share[MOVED].get(lane, 0.0) == pytest.approx(
            moved.decode.fixed.get(lane, 0.0), abs=1e-9
        )


def test_the_program_divides_the_cache_as_is_best() -> None:
    """Eight loads of weights in the cpu's time: 1 + 8 m of the link's are 8 (1 - m) of the cpu's at m = 7/16."""
    solver, evaluator = Candidates(SPACE), Evaluator(SPACE)
    best = solver.solved(replace(PLAIN, kv_moved=DIVIDED))[0]
    fitted = solver.fitted(best)
    assert fitted is not None
    assert fitted.policy.kv_moved == pytest.approx(7 / 16, abs=0.05)
    assert evaluator.tok_per_s(fitted.policy) > 1.4 * evaluator.tok_per_s(PLAIN)


@pytest.mark.slow
def test_a_search_divides_a_cache_where_that_is_faster() -> None:
    search = Search(SPACE)
    found = search.run()
    assert 0 < found.policy.kv_moved < 1
    others = [replace(found.policy, kv_moved=0.0), replace(found.policy, kv_moved=0.0, attention=AttentionSite.COMPUTE)]
    assert search.tok_per_s(found.policy) > 1.2 * max(map(search.tok_per_s, others))
    told = why(SPACE, found.plan, found.forecast, found.other)
    share = found.plan.realised_kv_moved * found.plan.realised_kv_cache["cpu"]
    assert f"but for {share:.0%} of the cache that is moved to the gpu" in told


def test_what_is_not_divided_has_the_neighbours_it_had() -> None:
    assert not any(one.kv_moved for one in neighbours(SPACE, PLAIN))
    others = list(neighbours(SPACE, replace(PLAIN, kv_moved=0.5)))
    assert {one.kv_moved for one in others} >= {0.25, 0.45, 0.5, 0.55, 0.75}
    assert {one.kv_moved for one in others if one.attention is AttentionSite.COMPUTE} == {0.0}


def test_a_neighbour_without_a_cache_in_host_memory_moves_none_of_it() -> None:
    """It stated the share of what it no longer had, which a command line with its settings refuses."""
    half = Placement(cpu=0.5, gpu=0.5)
    others = list(neighbours(SPACE, replace(PLAIN, kv_cache=half, kv_moved=0.5)))
    without = [one for one in others if not one.kv_cache.share(Tier.CPU)]
    assert without
    assert not any(one.kv_moved for one in without)
    assert any(one.kv_moved and one.kv_cache.share(Tier.CPU) == 0.5 for one in others)


@pytest.mark.parametrize("place", [Placement(cpu=1.0), Placement(cpu=0.75, disk=0.25), Placement(gpu=0.25, cpu=0.75)])
def test_the_plan_knows_what_share_is_really_moved(place: Placement) -> None:
    """Sequences are whole: 0.4 of the 6, 5 or 4 in host memory are 2. By bytes, which come in whole pages."""
    policy = Policy(6, 1, CPU, place, CPU, attention=AttentionSite.CPU, kv_moved=0.4)
    plan = plan_of(policy)
    spans = [span for kv_slot in plan.groups.kv_slots for span in kv_slot.kv if span.tier is Tier.CPU]
    moved = sum(span.count for span in spans if span.is_moved)
    assert moved == 2
    assert plan.realised_kv_moved == pytest.approx(moved / sum(span.count for span in spans), abs=0.03)
    assert plan_of(replace(policy, kv_moved=0.0)).realised_kv_moved == 0
    assert plan_of(replace(policy, kv_moved=0.0, attention=AttentionSite.COMPUTE)).realised_kv_moved == 1
    assert plan_of(replace(policy, kv_cache=Placement.all_on(Tier.DISK), kv_moved=0.0)).realised_kv_moved == 0


def test_layers_in_place_move_no_cache() -> None:
    policy = Policy(6, 1, CPU, CPU, CPU, attention=AttentionSite.CPU, kv_moved=0.5, offloaded=Offloaded.IN_PLACE)
    assert plan_of(policy).realised_kv_moved == 0


def test_both_schedules_are_tried() -> None:
    """Continuous schedules had the highest bounds, of which waiting left a third, and were all that was tried: OPT-6.7B
    on a T4 stayed at 319 tokens/s, where blocks make 356."""
    job = Job(SHAPE, DTYPE, MACHINE, 64, 8, None)
    search = Search(SearchSpace(job, (EXACT,)))
    starts = list(islice(search._divided_starts(PLAIN, 0.0), 4))
    assert {start.schedule for start in starts} == set(Schedule)
    assert all(0 < start.kv_moved < 1 for start in starts)
