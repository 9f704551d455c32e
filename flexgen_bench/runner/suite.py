"""Run the cells of a suite one after the other; every end of a cell is a record on disk."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from flexgen_bench.config.cell import Cell
from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.instructions import limited_to
from flexgen_bench.core.record import Record
from flexgen_bench.core.status import Status
from flexgen_bench.machine.environment import describe_environment
from flexgen_bench.runner.cell import make_record, run_cell
from flexgen_bench.runner.events import Display, RunningCell
from flexgen_bench.runner.job import TRACE_FILE, CellState
from flexgen_bench.runner.launch import cell_environment
from flexgen_bench.runner.memory_cap import MemoryCap
from flexgen_bench.runner.prepare import Prepared, preparation_key, prepare
from flexgen_bench.store.own_records import is_own, note_own
from flexgen_bench.store.reader import find_record, read_record
from flexgen_bench.store.trace import write_trace
from flexgen_bench.store.writer import write_record


class Forecast(Protocol):
    """What a cell's run is expected to be (``Record.prediction``); asked only when it is needed."""

    def seconds(self) -> float | None:
        """What the cell will take; None where nobody can say."""

    def before_run(self) -> Mapping[str, Any]:
        """What is known before it begins."""

    def of_policy(self, policy: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The same for the policy that has run; None if the system does not say which."""


@dataclass(frozen=True)
class PlannedCell:
    """A cell on its way to a record. refusal: it cannot run here, as known before any work, and why."""

    cell: Cell
    refusal: str | None = None
    forecast: Forecast | None = None


def run_suite(
    cells: Sequence[PlannedCell],
    *,
    suite: str,
    results_dir: Path,
    cache_dir: Path,
    rerun: bool,
    display: Display,
    on_record: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Run every cell that is not finished and return the path of each cell's record, in order.

    A cell is finished when ``results_dir`` holds a record of its spec for this suite, however it ended;
    only ``unavailable`` is looked at again. ``rerun`` runs all of them. ``on_record`` gets each new record's
    path; what it raises is told on stderr and loses nothing.

    Raises StoreError if a record cannot be saved, and KeyboardInterrupt; either way no process of a cell is
    left, and the records written so far stand.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    runner = _Runner(suite, results_dir, cache_dir, display)

    def finished(planned: PlannedCell) -> Path | None:
        return None if rerun else finished_record(results_dir, planned.cell.spec.spec_hash, suite)

    expected = [_expected(planned, finished(planned)) for planned in cells]
    display.suite_start(expected)
    paths = []
    for index, planned in enumerate(cells, start=1):
        label = planned.cell.label
        display.cell_start(label, index, len(cells), expected[index - 1])
        path = finished(planned)
        skipped = path is not None
        if path is None:
            path, skipped = runner.run(planned)
        record = read_record(path)
        display.cell_end(label, record.status, record.reason, path, skipped)
        paths.append(path)
        if on_record is not None and not skipped:
            _tell(on_record, path)
    display.suite_end()
    return paths


def _expected(planned: PlannedCell, done: Path | None) -> float | None:
    """Seconds that are to be waited for a cell; none for one that is finished or will be refused."""
    if done is not None or planned.refusal is not None:
        return 0.0
    return None if planned.forecast is None else planned.forecast.seconds()


def finished_record(results_dir: Path, spec_hash: str, suite: str) -> Path | None:
    """The record that makes running a cell again needless; None if it has to run.

    Records of failures count: running them again is asked for with ``rerun``. A cell that could not run is
    looked at again, as what was missing may have been installed. Records that came with the checkout were
    measured elsewhere and do not count, nor do those measured with other instructions of the processor than are
    permitted now.
    """
    path = find_record(results_dir, spec_hash, suite)
    if path is None:
        return None
    record = read_record(path)
    if record.status is Status.UNAVAILABLE or not is_own(results_dir, record.run_id):
        return None
    return path if record.environment.get("cpu", {}).get("limited_to", "") == limited_to() else None


@dataclass(frozen=True)
class _Runner:
    suite: str
    results_dir: Path
    cache_dir: Path
    display: Display
    preparations: dict[str, Prepared] = field(default_factory=dict)

    def run(self, planned: PlannedCell) -> tuple[Path, bool]:
        """Run a cell. The path of its record, and whether that one was there before."""
        cell = planned.cell
        started = datetime.now(UTC)
        variables = cell_environment(cell.spec.threads, cell.environment)
        environment = describe_environment(self.cache_dir, self.results_dir, variables)
        # On the cache's file system: offload files of a cell must lie on the disk that is measured.
        workdir = Path(tempfile.mkdtemp(prefix="cell-", dir=self.cache_dir)).absolute()
        try:
            prediction = self._prediction(planned.forecast)
            if planned.refusal is None:
                self.display.cell_runs(RunningCell(cell.spec, self.suite, prediction, environment))
            state, cap = self._outcome(planned, workdir, variables)
            prediction = self._of_what_ran(planned, state) or prediction
            trace = _bytes_of(workdir / TRACE_FILE)
        finally:
            shutil.rmtree(workdir, ignore_errors=True)
        record = make_record(
            cell.spec,
            suite=self.suite,
            rerun_command=cell.command,
            started=started,
            state=state,
            cap=cap,
            environment=environment,
            prediction=prediction,
            note=cell.note,
        )
        same = self._same_refusal(record)
        if same is not None:
            return same, True
        if trace is not None and record.samples:
            record = replace(record, trace=write_trace(record, trace, self.results_dir))
        path = write_record(record, self.results_dir)
        note_own(self.results_dir, record.run_id)
        return path, False

    def _prediction(self, forecast: Forecast | None) -> Mapping[str, Any]:
        """What the run is expected to be."""
        if forecast is None:
            return {}
        self.display.stage("predicting")
        return forecast.before_run()

    def _of_what_ran(self, planned: PlannedCell, state: CellState) -> Mapping[str, Any] | None:
        """The prediction for the policy that ran, where the system has chosen it. Before the run only what the machine
        has is known, not what will be free, so another policy may have been expected; None: that prediction stays."""
        if planned.forecast is None or not planned.cell.chooses_policy or state.status is not Status.OK:
            return None
        self.display.stage("predicting")
        return planned.forecast.of_policy(state.report.requested)

    def _outcome(
        self, planned: PlannedCell, workdir: Path, variables: Mapping[str, str]
    ) -> tuple[CellState, MemoryCap]:
        spec = planned.cell.spec
        no_cap = MemoryCap(spec.hardware.cpu_memory_bytes, reason="the cell did not start")
        if planned.refusal is not None:
            return CellState(status=Status.UNAVAILABLE, reason=planned.refusal), no_cap
        key = preparation_key(spec)
        if key not in self.preparations:
            self.preparations[key] = prepare(spec, self.cache_dir, workdir, self.display)
        prepared = self.preparations[key]
        if prepared.status is not Status.OK:
            return CellState(status=prepared.status, reason=prepared.reason), no_cap
        return run_cell(spec, prepared, self.cache_dir, workdir, self.display, variables)

    def _same_refusal(self, record: Record) -> Path | None:
        """The last record of the cell, if that says the same: every look would else leave one more."""
        if record.status is not Status.UNAVAILABLE:
            return None  # a measurement is always worth a record
        path = find_record(self.results_dir, record.spec_hash, self.suite)
        if path is None:
            return None
        last = read_record(path)
        return path if (last.status, last.reason) == (record.status, record.reason) else None


def _bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _tell(on_record: Callable[[Path], None], path: Path) -> None:
    try:
        on_record(path)
    except StoreError:
        raise
    except Exception as error:
        # The record is the truth and is saved: who only hears of it must not end the run.
        print(f"nobody was told of {path.name}: {error!r}. The record is saved.", file=sys.stderr)
