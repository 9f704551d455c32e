"""One suite of real cells and one accuracy run, tracked offline: starting wandb takes seconds, so tests share it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.accuracy.compare.compare import Margins
from flexgen_bench.accuracy.compare.outcome import outcomes
from flexgen_bench.config.cell import Cell
from flexgen_bench.core.cell import CellSpec, MeasureSpec, ModelSpec
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import GIB
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.runner.displays import Displays
from flexgen_bench.runner.events import SilentDisplay
from flexgen_bench.runner.suite import PlannedCell, run_suite
from flexgen_bench.store.accuracy_store import StoredAccuracy
from flexgen_bench.store.reader import StoredRecord, read_record
from flexgen_bench.trackers import wandb_tracker
from flexgen_bench.trackers.accuracy_run import send_accuracy
from flexgen_bench.trackers.registry import make_tracker
from flexgen_bench.trackers.suite import TrackedSuite
from tests.support.accuracy_factory import choice_items, mode_record, task_record
from tests.support.wandb_runs import OfflineRun, read_runs

SHAPE = ModelShape("nano", "opt", 2, 32, 4, 4, 8, 64, 128, 64, True)
TARGETS = {
    "flexgen": "flexgen_bench.systems.flexgen_system:FlexGenSystem",
    "transformers": "baselines.transformers.system:TransformersSystem",
    "missing": "tests.support.failing_systems:Needy",
}
PREDICTION = {"evidence": "SIMULATED", "tok_per_s": 50.0, "prefill_s": 0.5, "policy": {"gpu_batch_size": 2}}


class Forecast:
    def seconds(self) -> float | None:
        return None

    def before_run(self) -> Mapping[str, Any]:
        return PREDICTION

    def of_policy(self, policy: Mapping[str, Any]) -> Mapping[str, Any] | None:
        return None


def spec_of(system: str) -> CellSpec:
    on_disk, on_cpu = Placement.all_on(Tier.DISK), Placement.all_on(Tier.CPU)
    return CellSpec(
        system=system,
        target=TARGETS[system],
        model=ModelSpec(SHAPE),
        workload=Workload("short", PromptKind.SYNTHETIC, 4, 5, 6),
        hardware=HardwareProfile("cpu", Accelerator.NONE, cpu_memory_bytes=4 * GIB),
        dtype=DType.FLOAT32,
        threads=1,
        measure=MeasureSpec(repetitions=2, warmup=1, time_limit_s=200.0),
        policy=Policy(2, 1, on_disk, on_cpu, on_cpu) if system == "flexgen" else None,
    )


@dataclass(frozen=True)
class Tracked:
    """What was measured, and what the tracker has left of it."""

    folder: Path
    records: dict[str, StoredRecord]
    runs: list[OfflineRun]

    def cell(self, system: str) -> OfflineRun:
        (run,) = [run for run in self.runs if run.kind == "cell" and run.config["system"] == system]
        return run

    def of_kind(self, kind: str) -> list[OfflineRun]:
        return [run for run in self.runs if run.kind == kind]


def run_tracked(folder: Path, systems: tuple[str, ...], display: Any) -> list[Path]:
    return run_suite(
        [PlannedCell(Cell("", spec_of(system)), forecast=Forecast()) for system in systems],
        suite="pairs",
        results_dir=folder / "results",
        cache_dir=folder / "cache",
        rerun=False,
        display=display,
    )


@pytest.fixture(scope="session")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        home = folder / "home"  # of wandb's process alone: our cells have native code in theirs
        home.mkdir()
        of_wandb = wandb_tracker.wandb_environment
        patch.setattr(wandb_tracker, "wandb_environment", lambda d: of_wandb(d) | {"HOME": str(home)})
        tracker = make_tracker("wandb", {"project": "p", "timeout_s": 120.0}, folder / "results")
        assert tracker is not None
        with TrackedSuite(tracker, folder / "results") as follower:
            paths = run_tracked(folder, tuple(TARGETS), Displays(SilentDisplay(), follower))
            # What a resumed suite does: everything is skipped, and the table is sent again.
            assert run_tracked(folder, tuple(TARGETS), Displays(SilentDisplay(), follower)) == paths
            items, worse = choice_items(60, 0.8), choice_items(60, 0.8, flip=(1, 2, 3))
            tasks = [task_record(items), task_record(worse, "w4")]
            stored = StoredAccuracy([(Path(r.run_id), r) for r in tasks], [(Path("m"), mode_record("w4"))], ())
            send_accuracy(tracker, outcomes(stored, Margins()), folder / "results")
        assert list(home.rglob("*")) == []
    records = [StoredRecord(path, read_record(path)) for path in paths]
    return Tracked(folder, {str(s.record.spec["system"]): s for s in records}, read_runs(folder / "wandb"))
