"""Layers that several ranks share: all ranks run the same steps, and add up while they compute something else."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import ExpertLoads, Policy
from flexgen_bench.core.slices import Slice
from flexgen_bench.models.model import Model
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.schedule.scheduled_job import UnitKind
from flexgen_bench.schedule.sequence_groups import Request
from flexgen_bench.schedule.steps import Step, StepKind
from tests.schedule.test_schedule import EMULATED, HOST, Case, all_passes, all_steps, any_legal_order, cases, meaning
from tests.support.shapes import llama_shape, mixture_shape, opt_shape

LAYERS, RANKS = 3, 2
DENSE = Model.of(opt_shape(num_layers=LAYERS, num_heads=4, num_kv_heads=4), DType.FLOAT32)
MIXTURE = Model.of(mixture_shape(num_layers=LAYERS), DType.FLOAT32)
NEOX = ModelShape(
    "neox", "gpt_neox", LAYERS, 24, 4, 4, 6, 40, 64, 48, False, {"parallel": True, "rope_share": 1.0, "norm_eps": 1e-5}
)


def plans(case: Case, model: Model, ranks: int = RANKS) -> list[MemoryPlan]:
    slices = (model.sliced(Slice(rank, ranks)) for rank in range(ranks))
    return [plan_job(one, case.policy, case.hardware, case.requests) for one in slices]


def without_experts_apart(case: Case) -> Case:
    return replace(case, policy=replace(case.policy, experts=None, expert_loads=ExpertLoads.ALL))


@given(cases().map(without_experts_apart), st.sampled_from([DENSE, MIXTURE]), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_ranks_agree_and_every_legal_order_means_the_same(case: Case, model: Model, seed: int) -> None:
    """Sums meet by their order alone, so all ranks must emit the same steps, whatever the policy; and however fast
    their lanes are, each step reads what it would have read in program order."""
    first, last = plans(case, model)
    assert first.bytes == last.bytes
    steps = all_steps(case, first)
    assert steps == all_steps(case, last)
    assert meaning(any_legal_order(steps, random.Random(seed))) == meaning(steps)
    assert not any(step.kind is StepKind.LAYER for step in steps)
    reduced = Counter(step.unit for step in steps if step.kind is StepKind.REDUCE)
    outputs = Counter(step.unit for step in steps if step.kind is StepKind.OUTPUT)
    assert reduced == Counter({unit: 2 * count for unit, count in outputs.items()})


def two_micro_batches(model: Model, hardware: object = HOST) -> list[Step]:
    """The first decoding pass of two micro-batches."""
    case = Case(Policy(2, 2), hardware, (Request(3, 3),) * 4, {})  # type: ignore[arg-type]
    return all_passes(case, plans(case, model)[0])[1]


def test_one_micro_batch_is_computed_while_another_is_added_up() -> None:
    computed = [
        (step.kind.value, step.micro_batch_index)
        for step in two_micro_batches(DENSE)
        if step.unit == 2 and step.kind in (StepKind.PROJECT, StepKind.OUTPUT, StepKind.MLP, StepKind.ADD)
    ]
    assert computed == [
        *(("project", 0), ("output", 0), ("project", 1), ("output", 1)),
        *(("mlp", 0), ("mlp", 1), ("add", 0), ("add", 1)),
    ]


def test_attention_and_mlp_that_are_added_to_the_same_are_added_up_once() -> None:
    steps = two_micro_batches(Model.of(NEOX, DType.FLOAT32))
    kinds = Counter(step.kind for step in steps)
    assert kinds[StepKind.REDUCE] == kinds[StepKind.OUTPUT] == kinds[StepKind.ADD] == 2 * LAYERS
    assert kinds[StepKind.MLP] == 0


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_a_sum_moves(ranks: int) -> None:
    """A ring's bytes over the network; over the links of an accelerator the rows once each way."""
    case = Case(Policy(2, 2), EMULATED, (Request(3, 3),) * 4, {})
    plan = plans(case, DENSE, ranks)[0]
    for step in all_passes(case, plan)[1]:
        rows = 2 * 24 * 4  # two sequences of 24 float32
        if step.kind is StepKind.REDUCE:
            assert step.bytes == 2 * (ranks - 1) * rows // ranks
            assert step.lane is step.lane.link
        elif step.kind in (StepKind.MOVE_PARTIAL, StepKind.MOVE_REDUCED):
            assert step.bytes == rows


def test_slices_add_up_to_the_work_and_the_memory_of_one_device() -> None:
    """Of layers; the embedding and the head are on every rank."""
    model = Model.of(llama_shape(num_layers=LAYERS), DType.FLOAT32)
    case = Case(Policy(2, 2), HOST, (Request(3, 3),) * 4, {})
    whole, [part, _] = plan_job(model, case.policy, HOST, case.requests), plans(case, model)
    for one, own in zip(whole.job.units, part.job.units, strict=True):
        if one.kind is UnitKind.LAYER:
            assert own.flops_before * RANKS == one.flops_before
            assert 0 < own.flops_output < own.flops_after
            assert abs(own.flops_after * RANKS - one.flops_after) < 0.1 * one.flops_after  # norms are on both
        else:
            assert own == one
    host = whole.job.site
    assert part.groups.token_bytes * RANKS == whole.groups.token_bytes
    assert part.bytes[host]["sums"] == part.job.num_buffers * 6 * 24 * 4  # a prompt of each of two sequences
    assert "sums" not in whole.bytes[host]
