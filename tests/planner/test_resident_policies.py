"""Small batches that stay on the accelerator, on the machine where they were missed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_bench.config.build import hardware_profile, model_spec
from flexgen_bench.core.compression import EXACT, Compression, Lossy
from flexgen_bench.core.device_memory import job_bytes
from flexgen_bench.core.job import Job
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import AttentionSite, Placement, Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.engine_predictor import EnginePredictor
from flexgen_bench.planner.evaluator import Evaluator
from flexgen_bench.planner.resident_policies import SMALLEST_CHUNK, resident_policies
from flexgen_bench.planner.search_space import SearchSpace
from tests.support.planner_machines import DTYPE, HOST, accelerator, small_opt

GPU, CPU = Placement.all_on(Tier.GPU), Placement.all_on(Tier.CPU)
HARDWARE = hardware_profile("h100-16gb")
JOB = Job(model_spec("opt-6.7b").shape, DType.FLOAT16, HARDWARE, 512, 32, num_prompts=64)


def space_of(job: Job, *lossies: Lossy) -> SearchSpace:
    room = job_bytes(job.hardware)
    return SearchSpace(job, lossies or (EXACT,), {} if room is None else {Tier.GPU: room})


def test_as_many_sequences_as_there_is_room_for() -> None:
    """OPT-6.7B fills 13.3 of 16 GB: 7 sequences have room beside it if their prompts are computed in chunks. ``auto``
    streamed most of the weights instead, at 284 tokens/s: no chunk below 4096 tokens and no block of 7 was tried."""
    found = list(resident_policies(space_of(JOB)))
    assert found == [Policy(7, 1, GPU, GPU, GPU, prefill_chunk=7 * 128)]
    prediction = EnginePredictor({}, {"policy": found[0]}).predict(JOB)
    assert prediction.tok_per_s >= 600


def test_of_every_way_of_changing_results() -> None:
    """A model in 4 bits leaves room for more, in blocks that are equally full."""
    found = list(resident_policies(space_of(JOB, EXACT, Lossy(Compression(4)))))
    assert [policy.lossy for policy in found] == [EXACT, Lossy(Compression(4))]
    assert found[0].block_size < found[1].block_size <= 32
    blocks = -(-64 // found[1].block_size)
    assert blocks * found[1].block_size - 64 < blocks, "equally full"


@pytest.mark.parametrize("hardware", [HOST, accelerator(gpu_memory=2**17)], ids=["host", "small"])
def test_none_without_an_accelerator_or_without_room(hardware: object) -> None:
    job = Job(small_opt(), DTYPE, hardware, 16, 4, num_prompts=8)  # type: ignore[arg-type]
    assert not list(resident_policies(space_of(job)))


def test_all_that_is_there_fits_at_once() -> None:
    job = Job(small_opt(), DTYPE, accelerator(), 16, 4, num_prompts=300)
    (policy,) = resident_policies(space_of(job))
    assert (policy.gpu_batch_size, policy.num_gpu_batches, policy.prefill_chunk) == (100, 3, None)
    assert policy.gpu_batch_size * 16 >= SMALLEST_CHUNK


def test_a_layer_of_many_on_disk_is_not_nothing() -> None:
    """OPT-30B was taken with one of its 48 layers on disk: of the 12 by which policies were compared none was, so the
    room was had for nothing (57 tokens/s; 63 without)."""
    job = replace(JOB, shape=model_spec("opt-30b").shape, num_prompts=144)
    evaluator = Evaluator(space_of(job))
    one = 1 / 48
    weights, cache = Placement(gpu=2 * one, cpu=1 - 3 * one, disk=one), Placement(gpu=0.034, cpu=0.966)
    on_disk = Policy(36, 2, weights, cache, CPU, 3, attention=AttentionSite.CPU, prefill_chunk=8192)
    without = replace(on_disk, weights=Placement(gpu=2 * one, cpu=1 - 2 * one))
    assert 0 < evaluator.tok_per_s(on_disk) < 0.95 * evaluator.tok_per_s(without)
