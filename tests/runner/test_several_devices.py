"""A system that knows of one device is not asked what it does on several, nor is one that scores on one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_bench.config.cell import Cell
from flexgen_bench.core.cell import CellSpec, ModelSpec
from flexgen_bench.core.compression import EXACT
from flexgen_bench.core.errors import CannotRun
from flexgen_bench.core.model import DType
from flexgen_bench.core.simulated import SIMULATED_ONLY, SystemModel
from flexgen_bench.core.status import Status
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.runner.predictions import exactly, predict, questions, simulate
from flexgen_bench.systems.contract import ModelFiles
from flexgen_bench.systems.flexgen_system import FlexGenSystem
from tests.support.planner_machines import accelerator, small_opt

OURS = "flexgen_bench.systems.flexgen_system:FlexGenSystem"
THEIRS = "tests.support.failing_systems:Needy"


def cell(target: str, **several: int) -> Cell:
    machine = replace(accelerator(), cpu_memory_bytes=2**30, disk_bytes=2**30, **several)  # type: ignore[arg-type]
    workload = Workload("w", PromptKind.SYNTHETIC, 8, 32, 4)
    spec = CellSpec("s", target, ModelSpec(small_opt()), workload, machine, DType.FLOAT16, 1)
    return Cell("", spec, model=SystemModel("tests.support.fake_predictors:Plain"))


@pytest.mark.parametrize("name", ["count", "tensor_parallel"])
@pytest.mark.parametrize("target", [THEIRS, SIMULATED_ONLY])
def test_a_system_of_one_device_is_not_predicted_on_several(name: str, target: str, tmp_path: Path) -> None:
    """Its predictor read nothing of them, so that one device's figures stood for four."""
    request = exactly(cell(target, **{name: 4}))
    row = predict(request, EXACT, tmp_path)
    assert (row.status, row.prediction) == (Status.UNAVAILABLE, None)
    assert row.reason == f"s computes on one device here, not on gpu.{name}=4"
    assert [[one.reason for one in rows] for rows in simulate([request], tmp_path, lambda _: None)] == [[row.reason]]
    assert questions(request, tmp_path) == []
    assert predict(exactly(cell(target)), EXACT, tmp_path).status is Status.OK


def test_a_system_that_has_ranks_is_predicted(tmp_path: Path) -> None:
    assert predict(exactly(cell(OURS, count=2)), EXACT, tmp_path).status is Status.OK


def test_a_system_that_nobody_can_load_is_not_predicted_on_several(tmp_path: Path) -> None:
    row = predict(exactly(cell("no_such_module:S", count=2)), EXACT, tmp_path)
    assert row.status is Status.UNAVAILABLE
    assert "no_such_module" in row.reason


@pytest.mark.parametrize("name", ["count", "tensor_parallel"])
def test_scoring_on_several_devices_is_refused_by_its_key(name: str, tmp_path: Path) -> None:
    system = FlexGenSystem(cell(OURS, **{name: 2}).spec, ModelFiles(tmp_path, tmp_path, tmp_path))
    with pytest.raises(CannotRun, match=f"scores on one device, not on gpu.{name}=2"):
        system.scorer(None)
