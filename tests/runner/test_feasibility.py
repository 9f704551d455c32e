"""What is said of a cell that cannot be measured here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import initialize_config_dir

from flexgen_bench.cells.compose import composed
from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.config.build import cell_spec, model_spec
from flexgen_bench.config.paths import conf_dir, list_models
from flexgen_bench.core.cell import CellSpec, ModelSpec
from flexgen_bench.core.model import DType
from flexgen_bench.core.units import GB, GIB
from flexgen_bench.machine import host as machine
from flexgen_bench.models.registry import weight_bytes
from flexgen_bench.runner import feasibility
from flexgen_bench.runner.feasibility import explain, needs
from tests.support.shapes import no_progress, opt_shape

KNOWN = [model_spec(name).shape for name in list_models()]


@pytest.fixture(autouse=True)
def _laptop(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A laptop: 16 GiB, 100 GiB of disk, no GPU."""
    monkeypatch.setattr(machine, "local_gpus", tuple)
    monkeypatch.setattr(machine, "memory_bytes", lambda: 16 * GIB)
    monkeypatch.setattr(machine, "free_disk_bytes", lambda folder: 100 * GIB)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def spec(*overrides: str) -> CellSpec:
    return cell_spec(composed(["system=flexgen", *overrides]))


def refused(cell: CellSpec, cache: Path) -> str:
    refusal = explain(cell, cache, KNOWN)
    assert refusal is not None
    return refusal.text


def gpu(monkeypatch: pytest.MonkeyPatch, name: str, size: int, cuda: bool = True) -> None:
    monkeypatch.setattr(machine, "local_gpus", lambda: (machine.LocalGpu(name, size),))
    monkeypatch.setattr(machine, "torch_has_cuda", lambda: cuda)


def test_needs_of_opt_30b() -> None:
    """Weights and KV cache by hand: 30B parameters, 2 x 48 layers x 7168 x 2 bytes a token."""
    what = needs(spec("model=opt-30b", "workload=512-32", "workload.num_prompts=10"))
    assert what.weight_bytes == pytest.approx(59.95 * GB, rel=0.001)
    assert what.kv_prompt_bytes == 2 * 48 * 7168 * 2 * (512 + 32)
    assert what.kv_bytes == 10 * what.kv_prompt_bytes


def test_a_cell_that_can_run(tmp_path: Path) -> None:
    assert explain(spec("model=opt-1.3b"), tmp_path, KNOWN) is None
    assert explain(spec("model=opt-13b", "gpu.cpu_memory=2GiB"), tmp_path, KNOWN) is None
    assert explain(spec("model=opt-125m", "gpu=emulated"), tmp_path, KNOWN) is None


def test_opt_30b_on_a_t4(tmp_path: Path) -> None:
    text = refused(spec("model=opt-30b", "gpu=t4"), tmp_path)
    for part in (
        "no NVIDIA GPU whose name contains 'T4'",
        "208.00 GiB of host memory",
        "55.83 GiB for weights (bfloat16)",
        "84.00 MiB of KV cache for each sequence of 32+32 tokens (5.25 GiB for all 64)",
        "gpu=t4 stands for 15.00 GiB of GPU memory, 208.00 GiB of host memory, 1.36 TiB of disk",
        "Here: no NVIDIA GPU, 16.00 GiB of host memory, 100.00 GiB free",
        "model=opt-30b gpu=auto: its weights fit streamed from disk (takes 57.68 GiB of it)",
        "fits in memory here is opt-6.7b (12.40 GiB): model=opt-6.7b gpu=auto",
        "can be streamed from disk here is opt-13b (23.94 GiB): model=opt-13b gpu=auto",
    ):
        assert part in text, part


def test_the_same_model_here_where_the_disk_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dummy model of this size has one layer's numbers in its checkpoint; a trained one takes twice its weights."""
    assert explain(spec("model=opt-30b"), tmp_path, KNOWN) is None
    text = refused(spec("model=opt-30b", "weights=hub"), tmp_path)
    assert "111.66 GiB of free disk are needed" in text
    monkeypatch.setattr(machine, "free_disk_bytes", lambda folder: 200 * GIB)
    assert explain(spec("model=opt-30b", "weights=hub"), tmp_path, KNOWN) is None


@pytest.mark.parametrize(("name", "matches"), [("NVIDIA L4", True), ("NVIDIA L40", False), ("NVIDIA L40S", False)])
def test_a_card_is_known_by_whole_words(
    name: str, matches: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part of a name is another card's: an L40 was an L4, a T400 a T4."""
    gpu(monkeypatch, name, 48 * GIB)
    monkeypatch.setattr(machine, "memory_bytes", lambda: 256 * GIB)
    refusal = explain(spec("model=opt-125m", "gpu=l4"), tmp_path, KNOWN)
    assert (refusal is None) is matches
    if refusal is not None:
        assert "no NVIDIA GPU whose name contains 'L4'" in refusal.text


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    text = refused(spec("model=opt-175b", "weights=path", f"location={tmp_path}"), tmp_path)
    assert "need 650.45 GiB of free disk" in text
    text = refused(spec("model=opt-175b"), tmp_path)
    assert "need 329.80 GiB of free disk" in text


def test_a_finished_checkpoint_needs_no_more_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = opt_shape()
    cell = spec("model=opt-125m", "dtype=float32")
    small = CellSpec(**{**cell.__dict__, "model": ModelSpec(shape)})
    monkeypatch.setattr(machine, "free_disk_bytes", lambda folder: 0)
    assert explain(small, tmp_path) is not None
    monkeypatch.undo()
    prepare_checkpoint(small.model, DType.FLOAT32, tmp_path, no_progress)
    monkeypatch.setattr(machine, "free_disk_bytes", lambda folder: 0)
    assert explain(small, tmp_path) is None


def test_the_right_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the memory of the profile as a kernel tells it, or counted in GB."""
    gpu(monkeypatch, "Tesla T4", 15360 * 2**20)
    for memory in (204 * GIB, 208 * GB):
        monkeypatch.setattr(machine, "memory_bytes", lambda memory=memory: memory)
        assert explain(spec("model=opt-6.7b", "gpu=t4"), tmp_path) is None
    monkeypatch.setattr(machine, "memory_bytes", lambda: 180 * GIB)
    refusal = explain(spec("model=opt-6.7b", "gpu=t4"), tmp_path)
    assert refusal is not None
    assert "208.00 GiB of host memory, more than there is here" in refusal.machine


def test_another_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, "NVIDIA A10G", 24 * GIB)
    text = refused(spec("model=opt-1.3b", "gpu=t4", "gpu.cpu_memory=8GiB"), tmp_path)
    assert "'T4'" in text
    assert "Here: NVIDIA A10G (24.00 GiB)" in text


def test_a_smaller_card_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, "NVIDIA A100-SXM4-40GB", 40 * GIB)
    text = refused(spec("model=opt-1.3b", "gpu=a100", "gpu.gpu_memory=80GB"), tmp_path)
    assert "the GPU here has 40.00 GiB, the profile 74.51 GiB" in text


def test_a_gpu_and_a_torch_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, "Tesla T4", 16 * GB, cuda=False)
    text = refused(spec("model=opt-1.3b", "gpu=t4", "gpu.cpu_memory=8GiB"), tmp_path)
    assert "without CUDA" in text


def test_a_larger_cap_than_there_is_memory(tmp_path: Path) -> None:
    text = refused(spec("model=opt-125m", "gpu.cpu_memory=64GiB"), tmp_path)
    assert "64.00 GiB of host memory, more than there is here" in text


def test_weight_bytes_count_tied_embeddings_once() -> None:
    tied, untied = opt_shape(), opt_shape(tied_embeddings=False)
    difference = weight_bytes(untied, DType.BFLOAT16) - weight_bytes(tied, DType.BFLOAT16)
    assert difference == tied.vocab_size * tied.hidden_size * 2
    assert feasibility.weight_bytes(tied, DType.FLOAT32) == 2 * weight_bytes(tied, DType.BFLOAT16)


def test_what_is_recorded_does_not_change_with_the_free_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at an impossible cell once left one more record, because some bytes had been written."""
    first = explain(spec("model=opt-30b", "gpu=t4"), tmp_path, KNOWN)
    monkeypatch.setattr(machine, "free_disk_bytes", lambda folder: 90 * GIB)
    second = explain(spec("model=opt-30b", "gpu=t4"), tmp_path, KNOWN)
    assert first is not None
    assert second is not None
    assert first.reason == second.reason
    assert first.here != second.here
