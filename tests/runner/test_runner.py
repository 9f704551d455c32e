"""The runner: every end of a cell becomes a record, and nothing of a cell survives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import flexgen_bench.runner.suite
from flexgen_bench.config.cell import Cell
from flexgen_bench.config.schema import AppConf, SystemConf
from flexgen_bench.core.cell import CellSpec, MeasureSpec, ModelSpec, WeightSource
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.extras import how_to_install
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.record import Record, TuningProbe
from flexgen_bench.core.simulated import SystemModel
from flexgen_bench.core.status import Status
from flexgen_bench.core.units import MIB
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.runner import tuning
from flexgen_bench.runner.cell import run_cell
from flexgen_bench.runner.events import SilentDisplay
from flexgen_bench.runner.launch import cell_environment
from flexgen_bench.runner.memory_cap import MemoryCap
from flexgen_bench.runner.prepare import Prepared
from flexgen_bench.runner.suite import PlannedCell, run_suite
from flexgen_bench.store.reader import read_record

ROOT = Path(__file__).parents[2]
CAP = 700 * MIB  # room for Python and torch, not for what Hungry takes

SHAPE = ModelShape("nano", "opt", 1, 16, 2, 2, 8, 32, 64, 64, True)


def spec_of(system: str, **changes: Any) -> CellSpec:
    cap = changes.pop("cap", None)
    measure = {"repetitions": 2, "warmup": 1, "time_limit_s": 60.0} | changes
    return CellSpec(
        system=system.lower(),
        target=f"tests.support.failing_systems:{system}",
        model=ModelSpec(SHAPE),
        workload=Workload("w", PromptKind.SYNTHETIC, 4, 5, 6),
        hardware=HardwareProfile("local", Accelerator.NONE, cpu_memory_bytes=cap),
        dtype=DType.FLOAT32,
        threads=1,
        measure=MeasureSpec(**measure),
    )


@pytest.fixture(autouse=True)
def _find_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Record]]:
    """Runs cells of failing systems and returns their records. The model is not prepared: they read none."""
    prompts = [[1, 2, 3, 4, 5]] * 4
    prepared = Prepared(Status.OK, checkpoint=tmp_path / "checkpoint", prompts=prompts)
    prepared.checkpoint.mkdir()
    monkeypatch.setattr("flexgen_bench.runner.suite.prepare", lambda *_: prepared)

    def run(*specs: CellSpec, **options: Any) -> list[Record]:
        cells = [PlannedCell(Cell("", spec, (f"system={spec.system}",))) for spec in specs]
        settings: dict[str, Any] = {"rerun": False, "display": SilentDisplay()} | options
        paths = run_suite(
            settings.pop("cells", cells),
            suite="s",
            results_dir=tmp_path / "results",
            cache_dir=tmp_path / "cache",
            **settings,
        )
        assert not list((tmp_path / "cache").glob("cell-*")), "the cell's folder was left behind"
        return [read_record(path) for path in paths]

    return run


def test_a_good_cell_is_recorded_whole_and_not_run_twice(suite: Any, tmp_path: Path) -> None:
    told: list[Path] = []
    [record] = suite(spec_of("Counting"), on_record=told.append)
    assert record.status is Status.OK
    assert len(record.samples) == 2
    assert len(record.warmup_samples) == 1
    sample = record.samples[0]
    assert (sample.prompt_tokens, sample.generated_tokens, sample.decode_tokens) == (20, 24, 20)
    assert (sample.prefill_s, sample.decode_s) == (1.0, 5.0)
    assert record.batch_size == 4
    assert record.outputs["token_ids"] == [[0, 1, 2, 3, 4, 5]] * 4
    assert record.validity["repetitions_agree"]
    assert record.report.links["disk_read"].bytes == 7
    assert record.report.peak_bytes["cpu"] > 0
    assert record.environment["packages"]["torch"]
    assert record.environment["variables"]["OMP_WAIT_POLICY"] == "passive"
    assert record.rerun_command == "python -m flexgen_bench system=counting rerun=true"
    [again] = suite(spec_of("Counting"), on_record=told.append)
    assert again.run_id == record.run_id
    # And with a variable of its system's own, which its process has and the record tells.
    spinning = AppConf(system=SystemConf(environment={"GOMP_SPINCOUNT": "7"}))
    own = [PlannedCell(Cell("", spec_of("Counting"), conf=spinning))]
    [anew] = suite(cells=own, rerun=True, on_record=told.append)
    assert anew.run_id != record.run_id
    assert anew.report.realised["spins"] == anew.environment["variables"]["GOMP_SPINCOUNT"] == "7"
    assert anew.environment["variables"]["OMP_WAIT_POLICY"] == "passive"
    assert len(told) == 2


def test_every_bad_end_is_a_record_and_the_suite_goes_on(suite: Any) -> None:
    cells = ("Raising", "Crashing", "Refusing", "Needy", "Short", "Missing")
    records = suite(*[spec_of(name) for name in cells])
    by_name = dict(zip(cells, records, strict=True))
    assert by_name["Raising"].status is Status.FAILED
    assert "the weights are upside down" in by_name["Raising"].reason
    assert by_name["Crashing"].status is Status.FAILED
    assert "SIGSEGV" in by_name["Crashing"].reason
    assert "stage 'load'" in by_name["Crashing"].reason
    assert by_name["Refusing"].status is Status.UNAVAILABLE
    assert by_name["Refusing"].reason == "needs a flux capacitor"
    assert by_name["Needy"].status is Status.UNAVAILABLE
    assert "no_such_module_anywhere" in by_name["Needy"].reason
    assert by_name["Short"].status is Status.INVALID
    assert "exact_lengths" in by_name["Short"].reason
    assert by_name["Missing"].status is Status.FAILED
    assert "Missing" in by_name["Missing"].reason


def test_a_system_that_cannot_compress_refuses_a_lossy_cell(suite: Any) -> None:
    """It would otherwise stand in the table as if it had computed the same thing."""
    [record] = suite(replace(spec_of("Counting"), lossy=Lossy(weights=Compression(4))))
    assert record.status is Status.UNAVAILABLE
    assert "counting cannot follow policy.lossy.weights (4-bit weights)" in record.reason


def test_unavailable_is_looked_at_again_without_leaving_copies(suite: Any, tmp_path: Path) -> None:
    spec = spec_of("Counting")
    [first] = suite(cells=[PlannedCell(Cell("c", spec), "no GPU")])
    [second] = suite(cells=[PlannedCell(Cell("c", spec), "no GPU")])
    assert first.status is Status.UNAVAILABLE
    assert second.run_id == first.run_id
    assert len(list((tmp_path / "results").rglob("*.json"))) == 1
    [now] = suite(spec)
    assert now.status is Status.OK


def test_a_good_run_is_predicted_for_the_policy_that_ran(suite: Any) -> None:
    """What was expected before stays where nothing ran to its end, and where the system does not say what it ran."""

    ran: list[Any] = []

    class Known:
        def seconds(self) -> float | None:
            return None

        def before_run(self) -> Any:
            return {"tok_per_s": 343.0}

        def of_policy(self, policy: Any) -> Any:
            ran.append(policy)
            return {"tok_per_s": 251.0, "policy": policy} if policy else None

    def predicted(system: str, follows_policy: bool = True) -> Any:
        cell = Cell(system, spec_of(system), model=SystemModel(follows_policy=follows_policy))
        [record] = suite(cells=[PlannedCell(cell, forecast=Known())], rerun=True)
        return record.prediction

    chosen = to_json(Policy(2, 2))
    assert predicted("Choosing") == {"tok_per_s": 251.0, "policy": chosen}
    assert predicted("Choosing", follows_policy=False) == {"tok_per_s": 343.0}
    assert predicted("Counting") == {"tok_per_s": 343.0}
    assert predicted("ChoosingShort") == {"tok_per_s": 343.0}
    assert ran == [chosen, {}]


def test_a_failing_tracker_loses_nothing(suite: Any, capsys: Any) -> None:
    def track(path: Path) -> None:
        raise ConnectionError("no network")

    records = suite(spec_of("Refusing"), spec_of("Short"), on_record=track)
    assert len(records) == 2
    assert "no network" in capsys.readouterr().err


def test_time_limit_ends_a_cell_and_its_grandchildren(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    monkeypatch.setenv("PID_FILE", str(pids))
    [record] = suite(spec_of("Sleeping", time_limit_s=8.0))
    assert record.status is Status.TIMEOUT
    assert "stage 'load'" in record.reason
    assert all_gone(pids)


def test_memory_cap_kills_are_told_as_out_of_memory(suite: Any) -> None:
    [record] = suite(spec_of("Hungry", cap=CAP))
    skip_without_cap(record)
    assert record.status is Status.OOM
    assert "700.00 MiB" in record.reason
    assert record.memory_cap["oom_kills"] >= 1
    assert record.memory_cap["peak_bytes"] <= CAP
    assert record.memory_cap["peak_anonymous_bytes"] > CAP / 2


def test_a_killed_helper_process_is_told_as_out_of_memory(suite: Any) -> None:
    """A compiler killed for memory once showed up as a mere build failure."""
    [record] = suite(spec_of("Delegating", cap=CAP))
    skip_without_cap(record)
    assert record.status is Status.OOM
    assert "a process was killed for memory" in record.reason
    assert "CalledProcessError" in record.reason


def test_what_a_system_makes_once_is_made_outside_the_cap(suite: Any, tmp_path: Path) -> None:
    """A compiler needs more memory than a small cell has, and minutes the cell must not pay for."""
    [record] = suite(spec_of("Unprepared", cap=CAP))
    assert (tmp_path / "cache/made").exists()
    assert record.status is Status.OK, record.reason
    assert record.memory_cap["oom_kills"] == 0


@pytest.mark.parametrize("system", ["Hungry", "HungryLater"])
def test_a_batch_that_dies_of_memory_does_not_lose_the_cell(suite: Any, system: str) -> None:
    [record] = suite(spec_of(system, cap=CAP, batch_sizes=(1, 2, 4), warmup=0))
    skip_without_cap(record)
    assert record.status is Status.OK
    assert record.batch_size == 2
    rates = {probe.batch_size: probe.tok_per_s for probe in record.tuning}
    assert rates[4] is None
    assert rates[1] is not None
    assert rates[2] is not None
    assert "killed for memory" in record.tuning[-1].reason


def skip_without_cap(record: Record) -> None:
    if not record.memory_cap["enforced"]:
        pytest.skip(f"no memory cap on this host: {record.memory_cap['reason']}")


SUITE_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.runner import test_runner as t
t.run_good_then_sleeping(Path(sys.argv[1]))
"""


def run_good_then_sleeping(folder: Path) -> None:
    """In a process of its own: a suite whose second cell never ends."""
    folder.joinpath("checkpoint").mkdir()
    prepared = Prepared(Status.OK, checkpoint=folder / "checkpoint", prompts=[[1, 2]] * 4)
    flexgen_bench.runner.suite.prepare = lambda *_: prepared
    cells = [PlannedCell(Cell(s, spec_of(s, cap=CAP))) for s in ("Counting", "Sleeping")]
    run_suite(
        cells,
        suite="s",
        results_dir=folder / "results",
        cache_dir=folder / "cache",
        rerun=False,
        display=SilentDisplay(),
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ending_the_suite_leaves_no_process_and_valid_records(tmp_path: Path, how: signal.Signals) -> None:
    pids = tmp_path / "pids"
    parent = subprocess.Popen(
        [sys.executable, "-c", SUITE_SCRIPT.format(root=str(ROOT)), str(tmp_path)],
        env=os.environ | {"PID_FILE": str(pids)},
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    wait_until(lambda: parent.poll() is not None or (pids.exists() and pids.read_text()))
    found = [read_record(path).reason for path in (tmp_path / "results").rglob("*.json")]
    assert parent.poll() is None, (found, parent.communicate()[1].decode())
    guards = [p.pid for p in psutil.Process(parent.pid).children()]
    parent.send_signal(how)
    parent.communicate()
    wait_until(lambda: all_gone(pids) and not any(map(psutil.pid_exists, guards)))
    records = [read_record(path) for path in (tmp_path / "results").rglob("*.json")]
    assert [record.status for record in records] == [Status.OK]
    assert not list((tmp_path / "cache").glob("cell-*"))
    for guard in guards:
        assert not list(Path("/sys/fs/cgroup").rglob(f"flexgen-bench-{guard}"))


def all_gone(pid_file: Path) -> bool:
    pids = [int(pid) for pid in pid_file.read_text().split()]
    assert len(pids) == 2
    return not any(psutil.pid_exists(pid) for pid in pids)


def wait_until(condition: Callable[[], object], patience_s: float = 90.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


def probes(*rates: float | None) -> Sequence[TuningProbe]:
    return [TuningProbe(2**i, rate) for i, rate in enumerate(rates)]


def test_tuning_stops_at_the_peak_and_takes_the_best() -> None:
    sizes = tuning.candidates((8, 1, 2, 4, 64), num_prompts=10)
    assert sizes == [1, 2, 4, 8, 10]
    assert tuning.next_candidate(sizes, probes(1.0, 3.0)) == 4
    assert tuning.next_candidate(sizes, probes(1.0, 3.0, 2.0)) is None
    assert tuning.next_candidate(sizes, probes(1.0, None)) is None
    assert tuning.best(probes(1.0, 3.0, 2.0)) == 2
    assert tuning.best(probes(None)) is None


def test_projected_rate_counts_whole_batches() -> None:
    workload = Workload("w", PromptKind.SYNTHETIC, 10, 5, 11)
    # Three batches of four: 2 s of prefill and ten steps of 0.5 s each.
    assert tuning.projected_rate(4, 2.0, 0.5, 2, workload) == pytest.approx(110 / (3 * 7.0))


def test_an_extra_is_named_for_what_it_brings() -> None:
    assert "flexgen-bench[tracking]" in how_to_install("wandb.sdk")
    assert how_to_install("left_pad").endswith("pip install left_pad")


def test_a_broken_preparation_is_the_reason_of_every_cell(tmp_path: Path) -> None:
    missing = ModelSpec(SHAPE, WeightSource.PATH, str(tmp_path / "nowhere"))
    spec = replace(spec_of("Counting"), model=missing)
    [path] = run_suite(
        [PlannedCell(Cell("c", spec))],
        suite="s",
        results_dir=tmp_path / "results",
        cache_dir=tmp_path / "cache",
        rerun=False,
        display=SilentDisplay(),
    )
    record = read_record(path)
    assert record.status is Status.FAILED
    assert "nowhere" in record.reason


def test_run_cell_without_cap_says_so(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    prepared = Prepared(Status.OK, checkpoint=checkpoint, prompts=[[1, 2]] * 4)
    spec = spec_of("Counting")
    state, cap = run_cell(spec, prepared, tmp_path / "cache", tmp_path, SilentDisplay(), cell_environment(spec.threads))
    assert state.status is Status.OK
    assert cap == MemoryCap(reason="no cap was asked for")


def test_records_that_came_with_the_checkout_do_not_finish_a_cell(
    suite: Callable[..., list[Record]], tmp_path: Path
) -> None:
    """A fresh clone holds our records. `make bench` used to take them for its own and measured nothing."""
    first = suite(spec_of("Counting"))[0]
    assert suite(spec_of("Counting"))[0].run_id == first.run_id, "measured here: finished"
    (tmp_path / "results" / ".measured-here").unlink()
    assert suite(spec_of("Counting"))[0].run_id != first.run_id, "measured elsewhere: not finished"
