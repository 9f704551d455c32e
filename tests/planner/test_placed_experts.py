"""What experts placed apart from their layers cost, and where a search puts them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.job import Job
from flexgen_bench.core.policy import ExpertLoads, Offloaded, Placement, Policy
from flexgen_bench.core.tiers import Lane, Site, Tier
from flexgen_bench.models.model import Model
from flexgen_bench.planner.candidates import Candidates, batch_shapes
from flexgen_bench.planner.cost import StepCost
from flexgen_bench.planner.forecast import closed_form, forecast
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.planner.neighbours import neighbours
from flexgen_bench.planner.search_space import SearchSpace
from flexgen_bench.schedule.scheduled_job import UnitKind
from flexgen_bench.schedule.scheduler import Scheduler
from flexgen_bench.schedule.sequence_groups import Request
from flexgen_bench.schedule.steps import Step, StepKind
from tests.support.planner_machines import DTYPE, FOUR_BITS, HOST, MIB, accelerator
from tests.support.shapes import mixture_shape, opt_shape

# 7 layers of 16 experts of 0.38 MB, of which a token goes to 2; a layer's other weights take 0.13 MB.
SHAPE = mixture_shape(num_layers=8, hidden_size=128, head_dim=16, experts=16, expert_size=512, max_positions=256)
MODEL = Model.of(SHAPE, DTYPE)
GPU, CPU = Placement.all_on(Tier.GPU), Placement.all_on(Tier.CPU)
STREAMED = Policy(4, 2, GPU, GPU, GPU, experts=CPU)
TOUCHED = replace(STREAMED, expert_loads=ExpertLoads.TOUCHED)
IN_PLACE = replace(STREAMED, offloaded=Offloaded.IN_PLACE)
EXPERTS = sum(u.num_bytes for u in MODEL.packed_for(STREAMED).units if u.kind is UnitKind.EXPERTS)


def planned(policy: Policy, prompts: int = 8, model: Model = MODEL, **machine: float) -> MemoryPlan:
    return plan_job(model, policy, accelerator(**machine), [Request(8, 4)] * prompts)  # type: ignore[arg-type]


def decode_steps(plan: MemoryPlan, kind: StepKind) -> list[Step]:
    """Of the second pass."""
    scheduler = Scheduler(plan.policy, plan)
    list(scheduler.steps(scheduler.schedule()))
    scheduler.postprocess()
    return [step for step in scheduler.steps(scheduler.schedule()) if step.kind is kind]


def test_streamed_experts_bind_the_link_in_simulation_and_in_closed_form() -> None:
    plan = planned(STREAMED, h2d=1e8)
    simulated, sums = forecast(plan), closed_form(plan)
    assert simulated.moved_bytes()[Lane.H2D_WEIGHTS] == EXPERTS * 4
    assert simulated.total_s == pytest.approx(EXPERTS * 4 / 1e8, rel=0.05)
    assert sums.total_s == pytest.approx(simulated.total_s, rel=0.05)


def test_touched_experts_are_planned_by_what_may_be_expected() -> None:
    """4 tokens touch 16 (1 - (7/8)^4) = 6.6 of 16 experts, 8 touch 10.5, in a decode pass."""
    plan = planned(TOUCHED, h2d=1e8)
    of_pass = sum(step.bytes for step in decode_steps(plan, StepKind.LOAD_EXPERTS))
    assert of_pass == pytest.approx(EXPERTS * (1 - (7 / 8) ** 8), rel=1e-4)
    assert forecast(plan).decode_s < forecast(planned(STREAMED, h2d=1e8)).decode_s


def test_an_experts_step_reads_what_is_touched() -> None:
    """Few tokens read few experts: 1 reads 2, 4 read 6.6 in expectation. Where arithmetic is free and a step takes no
    time, that is all it takes."""
    seconds = []
    for size in (1, 4):
        plan = planned(replace(STREAMED, gpu_batch_size=size, num_gpu_batches=1), prompts=size)
        cost = StepCost(plan)
        [step, *_] = decode_steps(plan, StepKind.EXPERTS)
        unit = plan.job.units[step.unit]
        touched = 16 * (1 - (7 / 8) ** size)
        reading = touched * unit.expert_values * 2 / 1e11
        assert cost.seconds(step) >= reading
        seconds.append((cost.seconds(step) - 1e-6) / touched)
    assert seconds[0] == pytest.approx(seconds[1], rel=0.5)


def test_a_whole_layer_is_priced_by_the_same_experts() -> None:
    """Apart or not, a token meets the same weights: only the step of its own makes a difference."""
    whole, apart = (planned(policy) for policy in (Policy(4, 2, GPU, GPU, GPU), replace(STREAMED, experts=GPU)))
    assert forecast(whole).decode_s == pytest.approx(forecast(apart).decode_s, rel=0.1)
    assert sum(sum(parts.values()) for parts in whole.bytes.values()) == pytest.approx(
        sum(sum(parts.values()) for parts in apart.bytes.values()), rel=0.02
    )


def test_a_plan_tells_experts_from_the_rest() -> None:
    plan = planned(replace(STREAMED, experts=Placement(gpu=0.5, cpu=0.5)))
    held = {site: parts.get("experts", 0) for site, parts in plan.bytes.items()}
    assert sum(held.values()) == EXPERTS
    assert plan.realised_experts == pytest.approx({"gpu": 4 / 7, "cpu": 3 / 7, "disk": 0})
    assert plan.bytes[Site.GPU]["weight slots"] == 2 * plan.job.units[-1].load_bytes
    assert planned(TOUCHED).bytes[Site.GPU]["weight slots"] == plan.job.units[-1].load_bytes
    assert "weight slots" not in planned(IN_PLACE).bytes[Site.GPU]
    assert planned(IN_PLACE).bytes[Site.CPU]["expert workspace"] > 0


def test_compressed_experts_are_not_unpacked_as_a_whole() -> None:
    lossy = Lossy(weights=FOUR_BITS)
    plan = planned(replace(STREAMED, lossy=lossy), model=Model.of(SHAPE, DTYPE, FOUR_BITS))
    experts = [unit for unit in plan.job.units if unit.kind is UnitKind.EXPERTS]
    assert not any(unit.unpack for unit in experts)
    assert plan.bytes[Site.GPU]["unpacked weights"] < EXPERTS / 7


def test_the_program_puts_attention_on_the_accelerator_and_experts_on_the_host() -> None:
    """With room for little more than dense weights, one place for a layer's experts is worth less than all of them."""
    machine = accelerator(gpu_memory=36 * MIB, h2d=1e9)
    space = SearchSpace(Job(SHAPE, DTYPE, machine, 8, 4, 8), (EXACT,))
    solver = Candidates(space)
    [best, *_] = solver.solved(Policy(8, 1, experts=CPU))
    fitted = solver.fitted(best)
    assert fitted is not None
    assert fitted.policy.weights.gpu == pytest.approx(1)
    assert fitted.policy.experts is not None
    assert fitted.policy.experts.cpu > 0.5
    ways = {(shape.experts is None, shape.expert_loads, shape.offloaded) for shape in batch_shapes(space)}
    move, place = Offloaded.MOVE, Offloaded.IN_PLACE
    all_of_them, touched = ExpertLoads.ALL, ExpertLoads.TOUCHED
    assert ways == {(False, all_of_them, move), (False, touched, move), (False, all_of_them, place)}
    changed = [one for one in neighbours(space, replace(STREAMED, experts=GPU)) if one.experts is None]
    assert changed == [replace(STREAMED, experts=None)]


def test_dense_models_have_no_experts_to_choose() -> None:
    space = SearchSpace(Job(opt_shape(), DTYPE, HOST, 8, 4, 8), (EXACT,))
    assert all(shape.experts is None for shape in batch_shapes(space))


def test_a_shallow_model_has_the_layers_that_most_are_like() -> None:
    """The first layer is dense: a cost that is taken from it alone knew no experts."""
    thin = MODEL.shallow(1)
    assert [unit.kind for unit in thin.packed_for(STREAMED).units][-1] is UnitKind.EXPERTS
    assert thin.packed.units[1].num_bytes == MODEL.packed.units[2].num_bytes
    assert MODEL.shallow(8) is MODEL
    assert MODEL.shallow(7).packed.units[1].num_bytes == MODEL.packed.units[2].num_bytes
