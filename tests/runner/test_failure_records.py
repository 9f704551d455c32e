"""Failures of the engine as the records of the runner."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flexgen_bench.core.cell import CellSpec, MeasureSpec, ModelSpec
from flexgen_bench.core.errors import OutOfMemory, StoreError
from flexgen_bench.core.model import DType
from flexgen_bench.core.status import Status
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.runner.cell import run_cell
from flexgen_bench.runner.events import SilentDisplay
from flexgen_bench.runner.exit_status import ending
from flexgen_bench.runner.job import CellState
from flexgen_bench.runner.launch import cell_environment
from flexgen_bench.runner.prepare import Prepared
from tests.support.failing_hardware import RIGS, flip, overflowing

pytest_plugins = "tests.support.failure_fixtures"


def run_cell_with(
    folder: Path, name: str, damage: Callable[[PackedWeights], None], dtype: DType, factor: float
) -> CellState:
    ckpt, cache = overflowing(folder, name, factor)
    weights = PackedWeights.from_checkpoint(ckpt, dtype, cache)
    damage(weights)
    hardware, policy = RIGS["host"]
    spec = CellSpec(
        "flexgen",
        "flexgen_bench.systems.flexgen_system:FlexGenSystem",
        ModelSpec(weights.shape),
        Workload("w", PromptKind.SYNTHETIC, 4, 5, 6),
        hardware,
        dtype,
        1,
        MeasureSpec(repetitions=1, warmup=0, time_limit_s=90.0),
        policy,
    )
    prepared = Prepared(Status.OK, checkpoint=ckpt, prompts=[[5, 6, 7, 8, 9]] * 4)
    state, _ = run_cell(spec, prepared, cache, folder / "work", SilentDisplay(), cell_environment(spec.threads))
    return state


def corrupt_layer(weights: PackedWeights) -> None:
    flip(weights.store.path, weights.packed.units[2].offset)


def cut(weights: PackedWeights) -> None:
    os.truncate(weights.store.path, weights.packed.file_bytes - 100)


@pytest.mark.parametrize(
    ("damage", "dtype", "factor", "words"),
    [
        (
            corrupt_layer,
            DType.FLOAT32,
            1.0,
            ["block is corrupt", "to convert the checkpoint again", "in step load_weights of unit 2"],
        ),
        (cut, DType.FLOAT32, 1.0, ["truncated", "to convert again"]),
        (
            lambda weights: None,
            DType.FLOAT16,
            8e4,
            ["layer 1 has produced values", "check the checkpoint", "in step attend"],
        ),
    ],
)
def test_failures_become_records_that_say_what_to_do(
    damage: Callable[[PackedWeights], None], dtype: DType, factor: float, words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "work").mkdir()
    name = "model.layers.1.self_attn.v_proj.weight"
    state = run_cell_with(tmp_path, name, damage, dtype, factor)
    assert state.status is Status.FAILED
    for word in words:
        assert word in state.reason
    assert "Traceback" not in state.reason


def test_what_an_error_says_about_a_cell() -> None:
    memory = OutOfMemory("cpu", "allocating 1 GiB of kv_cache", "cannot allocate", "free it.")
    assert ending(memory) == (Status.OOM, str(memory))
    assert ending(torch.OutOfMemoryError("CUDA out\nmore")) == (Status.OOM, "CUDA out")
    assert ending(MemoryError()) == (Status.OOM, "MemoryError")
    status, reason = ending(ValueError("odd"))
    assert status is Status.FAILED
    assert reason.endswith("ValueError: odd")
    long = StoreError("x" * 2000 + " Delete it.")
    assert ending(long) == (Status.FAILED, str(long)), "what to do stands at the end"
