"""A suite that is tracked: every cell a run while it is measured, and one run with the table of all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from flexgen_bench.core.closing import Closing
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.moment import Moment
from flexgen_bench.core.status import Status
from flexgen_bench.report.rows import build_rows
from flexgen_bench.report.table import csv_values
from flexgen_bench.runner.events import RunningCell, SilentDisplay
from flexgen_bench.store.reader import StoredRecord, read_record
from flexgen_bench.store.writer import suite_folder
from flexgen_bench.trackers.base import TrackedResult, TrackedRun, TrackedTable, Tracker
from flexgen_bench.trackers.cell_run import cell_result, cell_run
from flexgen_bench.trackers.identity import tracked_id
from flexgen_bench.trackers.live_rows import LiveRows


class TrackedSuite(SilentDisplay, Closing):
    """A display of ``runner/events.py`` that tells a tracker. Cells that were finished before are not sent again, but
    stand in the table."""

    def __init__(self, tracker: Tracker, results_dir: Path) -> None:
        self._tracker, self._results_dir = tracker, Path(results_dir)
        self._rows: LiveRows | None = None  # of the cell that runs
        self._records: dict[str, list[StoredRecord]] = {}

    def cell_runs(self, cell: RunningCell) -> None:
        spec = cell.spec
        run = cell_run(
            to_json(spec),
            cell.suite,
            cell.prediction,
            cell.environment,
            spec_hash=spec.spec_hash,
            evidence=spec.evidence.value,
            results_dir=self._results_dir,
        )
        self._rows = LiveRows()
        self._tracker.begin(run)

    def moment(self, moment: Moment) -> None:
        if self._rows is not None:
            self._tracker.log(self._rows.row(moment))

    def cell_end(self, label: str, status: Status, reason: str, record: Path, skipped: bool) -> None:
        has_run, self._rows = self._rows is not None, None
        stored = StoredRecord(record, read_record(record))
        self._records.setdefault(suite_folder(stored.record.suite), []).append(stored)
        if not has_run and skipped:
            return
        if not has_run:  # refused before any work
            self._tracker.begin(self._run_of(stored))
        self._tracker.end(cell_result(stored))

    def suite_end(self) -> None:
        for suite, records in self._records.items():
            self._tracker.begin(self._suite_run(suite, records))
            self._tracker.end(_suite_result(records))
        self._records = {}

    def close(self) -> None:
        """Nothing follows, whether the suite has come to its end or was interrupted."""
        self._tracker.close()

    def _run_of(self, stored: StoredRecord) -> TrackedRun:
        record = stored.record
        return cell_run(
            record.spec,
            record.suite,
            record.prediction,
            record.environment,
            spec_hash=record.spec_hash,
            evidence=record.evidence.value,
            results_dir=self._results_dir,
            besides=record.run_id,
        )

    def _suite_run(self, suite: str, records: list[StoredRecord]) -> TrackedRun:
        return TrackedRun(
            id=tracked_id(self._results_dir, "suite", suite),
            name=f"suite {suite}",
            group=suite,
            kind="suite",
            tags=sorted({s.record.evidence.value for s in records}),
            config={"suite": suite, "spec_hashes": [s.record.spec_hash for s in records]},
        )


def _suite_result(records: list[StoredRecord]) -> TrackedResult:
    rows: list[dict[str, Any]] = [dict(csv_values(row, records[0].path.parent)) for row in build_rows(records)]
    counts = Counter(s.record.status.value for s in records)
    return TrackedResult(
        ok=True,
        summary={f"cells/{status}": count for status, count in counts.items()} | {"number_of_cells": len(records)},
        tables={"cells": TrackedTable(list(rows[0]), [list(row.values()) for row in rows])},
    )
