"""Memory as a share of the weights, and groups of cells written once for several shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hydra import initialize_config_dir

from flexgen_bench.cells.compose import composed, plan
from flexgen_bench.config.build import cell_spec
from flexgen_bench.config.machine import machine_profile
from flexgen_bench.config.matrix import every_group
from flexgen_bench.config.paths import conf_dir
from flexgen_bench.config.schema import CellGroupConf, GpuConf
from flexgen_bench.core.cell import CellSpec
from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.device_memory import process_bytes
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import DType
from flexgen_bench.models.registry import weight_bytes
from flexgen_bench.store.kept_predictions import key_of

MODEL = ("model=opt-125m", "system=flexgen", "workload=tiny", "gpu=cpu", "dtype=bfloat16")


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def spec(*overrides: str) -> CellSpec:
    return cell_spec(composed([*MODEL, *overrides]))


@pytest.mark.parametrize("text", ["50% of weights", "50 % of  weights", "50.0%of weights"])
def test_a_share_becomes_the_bytes_of_this_model(text: str) -> None:
    cell = spec(f"gpu.cpu_memory='{text}'")
    assert cell.hardware.cpu_memory_bytes == round(0.5 * weight_bytes(cell.model.shape, DType.BFLOAT16))
    assert cell.hardware.weight_shares == {"cpu": 0.5}
    assert from_json(CellSpec, to_json(cell), "spec") == cell


def test_the_measure_is_the_dtype_and_not_what_weights_are_compressed_to() -> None:
    share = "gpu.cpu_memory=75% of weights"
    exact, packed, wide = spec(share), spec(share, "policy.lossy.weights=4"), spec(share, "dtype=float32")
    assert packed.hardware == exact.hardware
    assert wide.hardware.cpu_memory_bytes == 2 * (exact.hardware.cpu_memory_bytes or 0)


def test_the_words_in_which_bytes_were_asked_for_are_no_part_of_a_cell() -> None:
    share = spec("gpu.cpu_memory=150% of weights")
    same = spec(f"gpu.cpu_memory={share.hardware.cpu_memory_bytes}")
    assert same.hardware != share.hardware
    assert same.spec_hash == share.spec_hash
    assert "weight_shares" not in to_json(same.hardware), "specs from before there were shares keep their form"


def test_the_words_are_no_part_of_a_prediction_either() -> None:
    from flexgen_bench.core.job import Job

    share = spec("gpu.cpu_memory=150% of weights")
    job = Job(share.model.shape, share.dtype, share.hardware, 8, 4)
    plain = replace(job, hardware=replace(job.hardware, weight_shares={}))
    predictor = "flexgen_bench.planner.engine_predictor:EnginePredictor"
    assert key_of(predictor, {}, {}, job) == key_of(predictor, {}, {}, plain)


def test_a_share_of_a_card_is_a_cap_on_it() -> None:
    """What the driver keeps of the card lies outside, as with gpu=gpu16."""
    cell = spec("gpu=t4", "dtype=float16", "gpu.gpu_memory=50% of weights", "gpu.cpu_memory=150% of weights")
    assert cell.hardware.weight_shares == {"gpu": 0.5, "cpu": 1.5}
    assert process_bytes(cell.hardware) == 0
    assert process_bytes(spec("gpu=t4", "dtype=float16").hardware) > 0


@pytest.mark.parametrize(
    "text",
    ["50%", "50% of memory", "-5% of weights", "0% of weights", "nan% of weights", "% of weights", "1e2% of weights"],
)
def test_what_is_no_share_is_refused_by_name(text: str) -> None:
    with pytest.raises(UserError, match=r"gpu\.cpu_memory"):
        spec(f"gpu.cpu_memory='{text}'")


def test_a_share_of_next_to_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="1 MiB"):
        spec("gpu.cpu_memory=0.1% of weights")


def test_a_share_without_a_model_is_refused() -> None:
    conf = GpuConf(name="mine", accelerator="none", cpu_memory="50% of weights")
    with pytest.raises(UserError, match=r"gpu\.cpu_memory.*a size such as 2GiB here"):
        machine_profile(conf)


def test_a_matrix_makes_a_group_for_each_combination() -> None:
    group = CellGroupConf(
        "{bits}bit-{share}",
        ["gpu.cpu_memory={share}% of weights", "policy.lossy.kv_cache={bits: 4}"],
        ["flexgen"],
        {"flexgen": ["policy.lossy.weights={bits}"]},
        {"bits": [4, 8], "share": [25, 50]},
    )
    made = every_group([group])
    assert [one.name for one in made] == ["4bit-25", "4bit-50", "8bit-25", "8bit-50"]
    assert made[1].overrides == ["gpu.cpu_memory=50% of weights", "policy.lossy.kv_cache={bits: 4}"]
    assert made[2].system_overrides == {"flexgen": ["policy.lossy.weights=8"]}
    plain = CellGroupConf("plain", ["model=opt-125m"], ["flexgen"])
    assert every_group([plain]) == [plain]


@pytest.mark.parametrize(
    ("name", "matrix", "complaint"),
    [
        ("{share}", {"share": []}, r"matrix\.share"),
        ("{size}", {"share": [1]}, "size"),
        ("one", {"share": [1, 2]}, "name"),
    ],
)
def test_what_is_wrong_with_a_matrix_is_named(name: str, matrix: dict[str, list[int]], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        every_group([CellGroupConf(name, [], ["flexgen"], {}, matrix)])


def test_the_ladder_has_every_rung_in_16_and_in_4_bits() -> None:
    overrides = ["suite=ladder", "system=flexgen"]
    cells = plan(composed(overrides), overrides, "ladder").cells
    rungs = {(cell.spec.hardware.weight_shares["cpu"], str(cell.spec.lossy)) for cell in cells}
    shares = {0.25, 0.5, 0.75, 1.0, 1.5}
    assert {share for share, _ in rungs} == shares
    assert len(rungs) == 3 * len(shares)
    sizes = {cell.spec.hardware.cpu_memory_bytes for cell in cells}
    assert len(sizes) == len(shares), "the same memory for 16-bit and for 4-bit cells of a rung"
    assert len({cell.spec.workload for cell in cells}) == 1


def test_a_share_outlives_a_capacity_that_is_set_aside() -> None:
    """What has run has fitted, whatever a model of memory says: a prediction for it is asked without a capacity."""
    cell = spec("gpu=t4", "dtype=float16", "gpu.gpu_memory=50% of weights")
    assert replace(cell.hardware, gpu_memory_bytes=None).weight_shares == {"gpu": 0.5}
