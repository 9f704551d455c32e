"""Layers that ranks share, predicted: one rank's part of the job, with its share of the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.slices import Slice
from flexgen_bench.core.tiers import Tier
from flexgen_bench.models.model import Model
from flexgen_bench.planner.ask import in_words
from flexgen_bench.planner.engine_predictor import EnginePredictor
from flexgen_bench.planner.forecast import closed_form, forecast
from flexgen_bench.planner.memory_plan import plan_job
from flexgen_bench.planner.sliced_job import slice_of
from flexgen_bench.schedule.sequence_groups import Request
from tests.support.planner_machines import DTYPE, EMULATED, accelerator
from tests.support.shapes import llama_shape

SHAPE = llama_shape(
    num_layers=4, hidden_size=1024, num_heads=16, num_kv_heads=8, head_dim=64, ffn_size=4096, vocab_size=512
)
FEW = Policy(2, 2, weights=Placement(cpu=1.0), kv_cache=Placement(gpu=1.0), activations=Placement(gpu=1.0))


def job(machine: HardwareProfile) -> Job:
    return Job(SHAPE, DTYPE, machine, 16, 8, num_prompts=4)


def predicted(machine: HardwareProfile, policy: Policy | None = FEW) -> float:
    run = EnginePredictor({}, {"policy": policy}).predict(job(machine))
    return run.prefill_s + run.decode_s


def test_few_sequences_whose_weights_stream_are_as_much_faster_as_there_are_links() -> None:
    """A slice of the weights goes over each device's own link; sums over a fast network take next to nothing, over a
    slow one all the time."""
    machine = accelerator(net_out=1e11, net_in=1e11)
    one, two, four = (predicted(replace(machine, tensor_parallel=ranks)) for ranks in (1, 2, 4))
    assert 1.8 < one / two < 2.05
    assert 3.2 < one / four < 4.1
    slow = predicted(replace(accelerator(net_out=1e6, net_in=1e6), tensor_parallel=2))
    rows = 4 * (16 + 7)  # of each of four layers, twice
    assert slow > 2 * 4 * rows * 1024 * DTYPE.bytes / 1e6 > 3 * one


def test_one_rank_has_its_share_of_what_ranks_have_in_common() -> None:
    machine = replace(accelerator(cpu_memory=2**30, disk=2**32), tensor_parallel=4)
    own = slice_of(job(machine))
    assert own.part == Slice(0, 4)
    assert own.hardware.tensor_parallel == 1
    assert own.hardware.capacity_bytes(Tier.CPU) == 2**28
    assert own.hardware.capacity_bytes(Tier.GPU) == machine.capacity_bytes(Tier.GPU)
    rates = [one.link_rate(lane) for lane in machine.lanes if lane.is_link for one in (machine, own.hardware)]
    assert all(part in (whole, whole / 4) for whole, part in zip(rates[::2], rates[1::2], strict=True) if whole)


def test_a_policy_is_searched_for_with_a_slice() -> None:
    """What fits no single device fits four, a quarter on each."""
    weights = sum(u.num_bytes for u in Model.of(SHAPE, DTYPE).packed.units)
    small = replace(EMULATED, gpu_memory_bytes=int(0.8 * weights))
    resident = replace(FEW, weights=Placement(gpu=1.0))
    with pytest.raises(DoesNotFit):
        predicted(small, resident)
    four = EnginePredictor({}, {"policy": None}).predict(job(replace(small, tensor_parallel=4)))
    assert four.settings["policy"]["weights"]["gpu"] == 1


@pytest.mark.parametrize("policy", [FEW, replace(FEW, num_gpu_batches=4), replace(FEW, overlap=False)])
def test_sums_are_simulated_and_bounded_like_all_else(policy: Policy) -> None:
    model = Model.of(SHAPE, DTYPE).sliced(Slice(0, 2))
    plan = plan_job(model, policy, accelerator(net_out=1e9, net_in=1e9), [Request(16, 8)] * 8)
    simulated, bound = forecast(plan), closed_form(plan)
    assert bound.total_s <= simulated.total_s * 1.001
    moved = {str(lane): count for lane, count in simulated.moved_bytes().items()}
    assert moved["net_out"] == 2 * 4 * 8 * (16 + 7) * 1024 * DTYPE.bytes


def test_a_job_without_slices_is_written_as_it_always_was() -> None:
    """Kept predictions are found by it."""
    assert "part" not in to_json(job(accelerator()))
    assert "2 devices that share every layer" in in_words(job(replace(accelerator(), tensor_parallel=2)))
