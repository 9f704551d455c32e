"""What a plan counts follows from a model's parts: FLOP, workspace, and what a window spares."""

from __future__ import annotations

import pytest

from flexgen_bench.config.build import model_spec
from flexgen_bench.config.paths import list_models
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.tiers import Site, Tier
from flexgen_bench.models.model import Model
from flexgen_bench.models.registry import family
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.schedule.scheduled_job import UnitKind
from flexgen_bench.schedule.scheduler import Scheduler
from flexgen_bench.schedule.sequence_groups import Request
from flexgen_bench.schedule.steps import Step, StepKind
from tests.support.planner_machines import accelerator

DTYPE = DType.FLOAT16


def planned(name: str, prompt_len: int = 16, policy: Policy | None = None) -> MemoryPlan:
    shape = model_spec(name).shape
    requests = [Request(prompt_len, 4)] * 2
    return plan_job(Model.of(shape, DTYPE), policy or Policy(2, 1), accelerator(), requests)


@pytest.mark.parametrize("name", list_models())
def test_two_flop_for_every_weight_and_token(name: str) -> None:
    """q, k and v before the attention, the rest behind it: of any form, not of OPT's 12 h^2."""
    shape = model_spec(name).shape
    layers = family(shape.family).inventory(shape).layers
    units = [u for u in planned(name).job.units if u.kind is UnitKind.LAYER]
    for unit, layer in zip(units, layers, strict=True):
        by_name = {tensor.spec.name: tensor.spec for tensor in layer}
        assert unit.flops_before == 2 * by_name["qkv.weight"].num_values
        assert unit.flops_before + unit.flops_after == 2 * sum(t.num_values for t in by_name.values())


def steps_of(plan: MemoryPlan, kind: StepKind) -> list[list[Step]]:
    """By pass."""
    found, scheduler = [], Scheduler(Policy(2, 1), plan)
    while not scheduler.is_done:
        steps = scheduler.steps(scheduler.schedule())
        found.append([step for step in steps if step.kind is kind])
        scheduler.postprocess()
    return found


def test_a_window_is_priced() -> None:
    """A prompt token attends to the window's tokens, and so does one that is decoded."""
    assert_windows("gemma-3-270m", 512, 700)
    assert_windows("mistral-7b-v0.1", 4096, 100)


def assert_windows(name: str, window: int, prompt: int) -> None:
    plan = planned(name, prompt)
    per_pair = plan.job.attention_flops_per_pair
    units = plan.job.units
    for number, steps in enumerate(steps_of(plan, StepKind.ATTEND)):
        for step in steps:
            most = units[step.unit].window or 10**9
            pairs = sum(min(t + 1, most) for t in range(prompt)) if number == 0 else min(prompt + number, most)
            assert step.flops == 2 * pairs * per_pair
    assert {u.window for u in units if u.kind is UnitKind.LAYER} >= {window}


def test_what_changes_scores_takes_room() -> None:
    """Soft caps and ALiBi hold scores of prompts in float32, some at a time."""
    everything = Placement.all_on(Tier.GPU)
    policy = Policy(2, 1, everything, everything, everything)
    for name in ("gemma-2-2b", "bloom-560m"):
        short, long = (planned(name, n, policy).bytes[Site.GPU]["workspace"] for n in (64, 2000))
        assert long - short > 4 * 2**20
