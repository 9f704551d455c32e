"""Steps of experts that are placed apart from their layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from flexgen_bench.core.policy import ExpertLoads, Offloaded, Placement, Policy
from flexgen_bench.core.tiers import Lane
from flexgen_bench.schedule.scheduled_job import UnitKind
from flexgen_bench.schedule.sequence_groups import Request
from flexgen_bench.schedule.steps import StepKind
from tests.schedule.test_schedule import EMULATED, LAYERS, MIXTURE, Case, all_passes, all_steps, cases

GPU, CPU, DISK = Placement(gpu=1), Placement(cpu=1), Placement(disk=1)


@given(cases().filter(lambda case: case.policy.experts is not None))
@settings(max_examples=60, deadline=None)
def test_experts_follow_their_layer(case: Case) -> None:
    """Once for every micro-batch that leaves a layer whose experts are apart; what they make is added where the layer
    is, after it was moved there if that is elsewhere."""
    job, steps = case.plan.job, [step for step in all_steps(case) if not step.on_weights]
    for unit in (unit for unit in job.units if unit.kind is UnitKind.EXPERTS):
        layer = job.units[unit.companion]
        own = [step for step in steps if step.unit in (unit.index, layer.index)]
        ends = [step for step in own if step.kind in (StepKind.OUTPUT, StepKind.LAYER)]
        computed = [step for step in own if step.kind is StepKind.EXPERTS]
        assert [step.micro_batch for step in computed] == [step.micro_batch for step in ends]
        assert {step.lane for step in computed} <= {unit.site.lane}
        added = [step for step in own if step.kind is StepKind.ADD_EXPERTS]
        assert len(added) == (len(computed) if layer.site is not unit.site else 0)
        moved = [step for step in own if step.kind in (StepKind.MOVE_ROUTED, StepKind.MOVE_EXPERTS)]
        assert len(moved) == 2 * len(added)
        loaded = [step for step in own if step.kind is StepKind.LOAD_EXPERTS]
        assert len(loaded) == (len(unit.path) * len(computed) if unit.on_demand else 0)


def test_units_that_a_model_has_anyway_keep_their_numbers() -> None:
    units = Case(Policy(experts=CPU), EMULATED, (Request(2, 2),), {}).plan.job.units
    kinds = [UnitKind.EMBED, *[UnitKind.LAYER] * LAYERS, UnitKind.HEAD, UnitKind.EXPERTS, UnitKind.EXPERTS]
    assert [unit.kind for unit in units] == kinds
    assert [unit.companion for unit in units] == [-1, -1, LAYERS + 2, LAYERS + 3, -1, 2, 3]
    assert sum(unit.num_bytes for unit in MIXTURE.packed.units) == sum(
        unit.num_bytes for unit in MIXTURE.packed_for(Policy(experts=CPU)).units
    )


def test_experts_are_loaded_ahead_in_the_order_of_their_use() -> None:
    policy = Policy(1, 2, DISK, GPU, GPU, prefetch=2, experts=CPU)
    case = Case(policy, EMULATED, (Request(2, 2),) * 2, {})
    loads = [s.unit for s in all_passes(case, case.plan)[0] if s.lane is Lane.H2D_WEIGHTS]
    assert loads[:7] == [1, 2, 5, 3, 6, 4, 1]


def test_touched_experts_are_loaded_once_they_are_known() -> None:
    """The first micro-batch brings what it touches, the next ones what none before them did: in expectation of 8
    experts, 2 for each token."""
    policy = Policy(1, 3, GPU, GPU, GPU, experts=CPU, expert_loads=ExpertLoads.TOUCHED)
    case = Case(policy, EMULATED, (Request(1, 2),) * 3, {})
    steps = [step for step in all_passes(case, case.plan)[1] if not step.on_weights]
    of_layer = [step.kind for step in steps if step.unit in (2, 5)]
    assert of_layer == [StepKind.LAYER, StepKind.LOAD_EXPERTS, StepKind.EXPERTS] * 3
    block = case.plan.job.units[5].expert_bytes
    loads = [step.bytes / block for step in steps if step.kind is StepKind.LOAD_EXPERTS and step.unit == 5]
    assert loads == pytest.approx([2, 1.5, 1.125], rel=1e-4)


def test_the_accelerator_goes_on_while_the_cpu_computes_experts() -> None:
    """The next micro-batch's layer comes before what the experts of the one before it have made is added."""
    policy = Policy(1, 3, GPU, GPU, GPU, offloaded=Offloaded.IN_PLACE, experts=CPU)
    case = Case(policy, EMULATED, (Request(2, 2),) * 3, {})
    decode = all_passes(case, case.plan)[1]
    on_gpu = [(s.kind, s.micro_batch_index) for s in decode if s.lane is Lane.GPU and s.unit == 2]
    layer, add = StepKind.LAYER, StepKind.ADD_EXPERTS
    assert on_gpu == [(layer, 0), (layer, 1), (add, 0), (layer, 2), (add, 1), (add, 2)]
    kinds = {step.kind for step in all_steps(replace(case, policy=replace(policy, offloaded=Offloaded.MOVE)))}
    assert StepKind.ADD_EXPERTS not in kinds
