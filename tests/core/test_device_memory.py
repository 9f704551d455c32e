"""What a process takes of a GPU beside its tensors: the same for this engine, measured or simulated, and for its
rivals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from baselines.common.machine import Machine, largest_that_fits
from flexgen_bench.config.build import hardware_profile, model_spec
from flexgen_bench.config.cell import Cell
from flexgen_bench.core.cell import CellSpec, ModelSpec
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import EXACT
from flexgen_bench.core.device_memory import CONTEXT_BYTES, DRIVER_BYTES, WORKSPACE_BYTES, job_bytes, process_bytes
from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.simulated import SystemModel
from flexgen_bench.core.status import Status
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import GIB, MIB
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.planner.engine_predictor import EnginePredictor
from flexgen_bench.runner.predictions import PredictionRequest, predict, predict_policy
from tests.support.planner_machines import accelerator

T4 = hardware_profile("t4")
GPU = Placement.all_on(Tier.GPU)
RESIDENT = Policy(1, 1, GPU, GPU, GPU)
ENGINE = SystemModel("flexgen_bench.planner.engine_predictor:EnginePredictor", follows_policy=True)


SHAPE = model_spec("opt-1.3b").shape
LARGE = 2**36


def card(gpu_memory: int) -> HardwareProfile:
    """A CUDA card with so much memory."""
    return replace(accelerator(), gpu_memory_bytes=gpu_memory)


def job(hardware: HardwareProfile) -> Job:
    return Job(SHAPE, DType.FLOAT16, hardware, 32, 8, num_prompts=1)


def predicted(hardware: HardwareProfile) -> dict[str, int]:
    options = {"policy": RESIDENT}
    return dict(EnginePredictor({}, options).predict(job(hardware)).bytes)


def test_what_was_measured() -> None:
    """An H100's context and driver take about a gibibyte together."""
    assert pytest.approx(1006 * MIB, rel=0.01) == DRIVER_BYTES + CONTEXT_BYTES
    assert job_bytes(T4) == 15 * GIB - DRIVER_BYTES - CONTEXT_BYTES - WORKSPACE_BYTES


def test_everybody_pays_the_same_for_a_process() -> None:
    """Simulations of this engine took the whole card, rivals' a gigabyte less."""
    assert Machine(T4).process_bytes == process_bytes(T4)
    needed = predicted(card(LARGE))["gpu"]
    weights = 2 * 1_315_000_000
    assert needed > process_bytes(T4) + WORKSPACE_BYTES + weights
    assert predicted(card(needed))["gpu"] <= needed
    with pytest.raises(DoesNotFit) as caught:
        predicted(card(needed - WORKSPACE_BYTES))
    assert caught.value.tier == Tier.GPU


def test_other_devices_have_no_context() -> None:
    emulated = replace(accelerator(), accelerator=Accelerator.EMULATED)
    assert process_bytes(emulated) == 0
    assert job_bytes(emulated) is None


def test_a_policy_that_has_run_is_predicted_whatever_the_model_says_of_memory(tmp_path: Path) -> None:
    """Under a cap of torch's allocator the context lies outside of the cap."""
    tight = card(predicted(card(LARGE))["gpu"] - WORKSPACE_BYTES)
    spec = CellSpec(
        "s",
        "m:S",
        ModelSpec(SHAPE),
        Workload("w", PromptKind.SYNTHETIC, 1, 32, 8),
        tight,
        DType.FLOAT16,
        1,
        policy=RESIDENT,
    )
    request = PredictionRequest(Cell("", spec, model=ENGINE), 1)
    assert predict(request, EXACT, tmp_path).status is Status.OOM
    row = predict_policy(request, to_json(RESIDENT), tmp_path)
    assert row is not None
    assert row.status is Status.OK


@pytest.mark.parametrize("most", [1, 2, 3, 5, 7, 18, 36, 76, 196, 255, 256])
def test_the_largest_that_fits_is_any_number(most: int) -> None:
    """It was a power of two; the paper prints 5, 7, 18, 36, 76 and 196."""

    def fits(count: int) -> None:
        if count > most:
            raise DoesNotFit(Tier.GPU, count, most, "", "")

    assert largest_that_fits(fits, 256) == most
    assert largest_that_fits(fits, 4) == min(most, 4)
    with pytest.raises(DoesNotFit):
        largest_that_fits(lambda count: fits(count + most), 256)
