"""What a running cell tells the process that watches it: one JSON object per line, on a pipe.

Three kinds of line exist::

    {"event": "stage", "text": "loading weights"}
    {"event": "progress", "what": "decode", "done": 96, "total": 512, "unit": "tokens"}
    {"event": "moment", ...}    # the fields of ``core.moment.Moment``

and nothing else; results never travel this way. Systems announce a stage (a long compilation, say) through
the logger ``flexgen_bench.stage``, and progress outside generation with ``extra={"progress": (what, done,
total, unit)}``: they need not know who listens.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flexgen_bench.core.cell import CellSpec
from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.moment import Moment
from flexgen_bench.core.status import Status

STAGE_LOGGER = "flexgen_bench.stage"
MIN_INTERVAL_S = 0.1  # progress lines at most this often, so that telling costs nothing


@dataclass(frozen=True)
class RunningCell:
    """A cell whose process is about to start. prediction: what is expected of it, as in ``Record.prediction``;
    environment: of this machine, as in ``Record.environment``."""

    spec: CellSpec
    suite: str
    prediction: Mapping[str, Any]
    environment: Mapping[str, Any]


class Display(Protocol):
    """Where a suite shows what it is doing. All methods are called from the thread that runs the suite."""

    def suite_start(self, expected_s: Sequence[float | None]) -> None:
        """A suite begins; seconds that each of its cells will take, 0 for those that are finished, None for what nobody
        knows."""

    def cell_start(self, label: str, index: int, total: int, expected_s: float | None) -> None:
        """Cell ``index`` (from 1) of ``total`` begins, and will take so many seconds."""

    def cell_runs(self, cell: RunningCell) -> None:
        """The cell that has begun is neither finished nor refused: its process starts when this returns."""

    def moment(self, moment: Moment) -> None:
        """How far the current cell has come: about once a second while it generates."""

    def stage(self, text: str) -> None:
        """The current cell says what it does now."""

    def progress(self, what: str, done: int, total: int, unit: str) -> None:
        """``what`` is convert, load, prefill or decode; ``unit`` is B or tokens."""

    def cell_end(self, label: str, status: Status, reason: str, record: Path, skipped: bool) -> None:
        """The cell's record is on disk; ``skipped`` when it was there before."""

    def suite_end(self) -> None:
        """Its last cell has ended."""


class SilentDisplay:
    """Shows nothing."""

    def suite_start(self, expected_s: Sequence[float | None]) -> None:
        """Nothing."""

    def cell_start(self, label: str, index: int, total: int, expected_s: float | None) -> None:
        """Nothing."""

    def cell_runs(self, cell: RunningCell) -> None:
        """Nothing."""

    def moment(self, moment: Moment) -> None:
        """Nothing."""

    def stage(self, text: str) -> None:
        """Nothing."""

    def progress(self, what: str, done: int, total: int, unit: str) -> None:
        """Nothing."""

    def cell_end(self, label: str, status: Status, reason: str, record: Path, skipped: bool) -> None:
        """Nothing."""

    def suite_end(self) -> None:
        """Nothing."""


class Emitter:
    """Writes event lines to a file descriptor. A watcher that has gone away is not an error here:
    whoever supervises this process ends it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._last_s = 0.0

    def stage(self, text: str) -> None:
        self._write({"event": "stage", "text": text})

    def progress(self, what: str, done: int, total: int, unit: str) -> None:
        now = time.monotonic()
        if done < total and now - self._last_s < MIN_INTERVAL_S:
            return
        self._last_s = now
        self._write({"event": "progress", "what": what, "done": int(done), "total": int(total), "unit": unit})

    def moment(self, moment: Moment) -> None:
        """Whoever calls this bounds how often."""
        self._write({"event": "moment"} | to_json(moment))

    def tokens(self, phase: str, done: int, total: int) -> None:
        """Progress of a generation, in the form the System contract calls it."""
        self.progress(phase, done, total, "tokens")

    def _write(self, event: dict[str, Any]) -> None:
        try:
            os.write(self._fd, (json.dumps(event) + "\n").encode())
        except BrokenPipeError:
            return


class StageHandler(logging.Handler):
    """Turns messages of the ``flexgen_bench.stage`` logger into events."""

    def __init__(self, emitter: Emitter) -> None:
        super().__init__(logging.INFO)
        self._emitter = emitter

    def emit(self, record: logging.LogRecord) -> None:
        progress = getattr(record, "progress", None)
        if progress is None:
            self._emitter.stage(record.getMessage())
        else:
            self._emitter.progress(*progress)


def take_stdout() -> Emitter:
    """Use this process's standard output as the event pipe, and send what libraries print to stderr.

    The pipe is not inherited by children, so a grandchild that outlives us cannot hold it open.
    """
    pipe = os.dup(1)
    os.dup2(2, 1)
    emitter = Emitter(pipe)
    logger = logging.getLogger(STAGE_LOGGER)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(StageHandler(emitter))
    return emitter


def show(line: str, display: Display) -> None:
    """Show one event line. A line that is not an event (a library writing to the pipe) is shown nowhere."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return
    if not isinstance(event, dict):
        return
    if event.get("event") == "stage":
        display.stage(str(event["text"]))
    elif event.get("event") == "progress":
        display.progress(event["what"], event["done"], event["total"], event["unit"])
    elif event.pop("event", None) == "moment":
        try:
            moment = from_json(Moment, event, "moment")
        except UserError:  # what else on the pipe looks like one
            return
        display.moment(moment)
