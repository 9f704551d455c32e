"""A display that keeps a file of what the suite does, for a page that watches (``store/running.py``)."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flexgen_bench.core.closing import Closing
from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.status import Status
from flexgen_bench.runner.display import Meter
from flexgen_bench.runner.events import SilentDisplay
from flexgen_bench.store.reader import read_record
from flexgen_bench.store.running import (
    FINISHED,
    RUNNING,
    STOPPED,
    WAITING,
    RunningCell,
    RunningSuite,
    forget_ended,
    write_running,
)

_INTERVAL_S = 1.0  # progress is written at most this often: it must not slow the cell down


class ProgressFile(SilentDisplay, Closing):
    """Follows a suite. A file that cannot be written is told once, and the suite goes on.

    clock: seconds (for tests).
    """

    def __init__(self, results_dir: Path, suite: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._results, self._clock = results_dir, clock
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self._suite = RunningSuite(os.getpid(), suite, started, ())
        self._cells: list[RunningCell] = []
        self._at = -1
        self._begun_s = self._reported_s = self._written_s = clock()
        self._meter: Meter | None = None
        self._what = ""
        self._broken = False

    def suite_start(self, expected_s: Sequence[float | None]) -> None:
        """All cells begin as waiting."""
        self._cells = [RunningCell(expected_s=seconds) for seconds in expected_s]
        forget_ended(self._results)
        self._write()

    def cell_start(self, label: str, index: int, total: int, expected_s: float | None) -> None:
        """This one runs."""
        self._cells += [RunningCell()] * (total - len(self._cells))
        self._at, self._begun_s, self._meter = index - 1, self._clock(), None
        self._cells[self._at] = RunningCell(RUNNING, label, expected_s)
        self._write()

    def stage(self, text: str) -> None:
        """What it does now."""
        self._meter = None
        self._write(stage=text)

    def progress(self, what: str, done: int, total: int, unit: str) -> None:
        """How far it is."""
        now = self._clock()
        if self._meter is None or self._what != what or done < self._meter.done:
            self._meter, self._what = Meter(unit, total), what
        self._meter.advance(done, now - self._reported_s)
        self._reported_s = now
        if now - self._written_s >= _INTERVAL_S:
            self._write(meter=f"{what} {self._meter.text()}")

    def cell_end(self, label: str, status: Status, reason: str, record: Path, skipped: bool) -> None:
        """How it ended, and its record."""
        took = None if skipped else self._clock() - self._begun_s
        expected = self._cells[self._at].expected_s
        run = _run_of(record)
        self._cells[self._at] = RunningCell(status.value, label, expected, took, run, " ".join(reason.split()), skipped)
        self._write(stage="", meter="")

    def suite_end(self) -> None:
        """All cells have ended."""
        self._write(state=FINISHED, stage="", meter="")

    def close(self) -> None:
        """Nobody follows any more; a suite that has not ended was stopped."""
        if self._suite.state == RUNNING and self._cells:
            self._cells = [replace(cell, state=WAITING) if cell.state == RUNNING else cell for cell in self._cells]
            self._write(state=STOPPED, stage="", meter="")

    def _left_s(self) -> float | None:
        """Of all that is not done; None where some of it is not known."""
        waiting = [c.expected_s for c in self._cells if c.state == WAITING]
        running = [c for c in self._cells if c.state == RUNNING]
        if any(c.expected_s is None for c in running) or None in waiting:
            return None
        gone = self._clock() - self._begun_s
        now = sum(max(0.0, (c.expected_s or 0.0) - gone) for c in running)
        return now + sum(seconds or 0.0 for seconds in waiting)

    def _write(self, **changes: Any) -> None:
        self._written_s = self._clock()
        self._suite = replace(self._suite, cells=tuple(self._cells), left_s=self._left_s(), **changes)
        if self._broken:
            return
        try:
            write_running(self._suite, self._results)
        except OSError as error:
            self._broken = True
            print(f"what this suite does cannot be watched: {error}", file=sys.stderr)


def _run_of(record: Path) -> str:
    try:
        return read_record(record).run_id
    except StoreError:
        return ""
