"""What this engine is predicted to do: phases only where they are apart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_bench.core.job import Job
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Placement, Policy, Schedule
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.engine_predictor import EnginePredictor
from tests.support.planner_machines import host, small_opt

CPU = Placement.all_on(Tier.CPU)
# Micro-batches of two sequences, two of them to a block.
CONTINUOUS = Policy(2, 2, CPU, CPU, CPU, schedule=Schedule.CONTINUOUS)


def predicted(policy: Policy, prompts: int) -> Prediction:
    job = Job(small_opt(), DType.FLOAT16, host(), 32, 8, num_prompts=prompts)
    return EnginePredictor({}, {"policy": policy}).predict(job)


def test_phases_of_blocks_that_overlap_are_not_told() -> None:
    """The prefill of the first micro-batch was told as that of all prompts, and the rest of prefill as decode."""
    done = predicted(CONTINUOUS, 12)
    assert done.overlapped
    assert done.phases_s == (None, None)
    assert (done.prefill_tok_per_s, done.decode_tok_per_s) == (None, None)
    assert done.block_latency_s == pytest.approx(done.total_s / done.blocks)
    assert done.tok_per_s == pytest.approx(12 * 8 / done.total_s)


def test_phases_that_are_apart_are_told() -> None:
    """Block by block, and of a continuous job that is one micro-batch."""
    for policy, prompts in ((replace(CONTINUOUS, schedule=Schedule.BLOCK), 12), (CONTINUOUS, 2)):
        done = predicted(policy, prompts)
        assert not done.overlapped
        assert done.phases_s == (done.prefill_s, done.decode_s)
        assert done.prefill_tok_per_s == pytest.approx(prompts * 32 / done.prefill_s)
        assert done.decode_tok_per_s == pytest.approx(prompts * 7 / done.decode_s)
        assert done.block_latency_s == pytest.approx(done.total_s / done.blocks)


def test_one_block_has_a_latency_even_if_its_micro_batches_overlap() -> None:
    done = predicted(CONTINUOUS, 4)
    assert done.overlapped
    assert done.phases_s == (None, None)
    assert done.block_latency_s == done.total_s
