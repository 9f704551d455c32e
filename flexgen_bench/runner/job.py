"""What the parent hands to a cell's process, and what comes back, as JSON files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexgen_bench.core.cell import CellSpec
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.record import Sample, SystemReport, TuningProbe
from flexgen_bench.core.status import Status
from flexgen_bench.store.schema import decode_as

Prompts = list[list[int]]

# Beside the state file: what ``store/trace.py`` made of the last repetition, if the system keeps a timeline.
TRACE_FILE = "trace.json.gz"


@dataclass(frozen=True)
class CellProcessJob:
    """One start of a cell's process.

    tuning: probes of earlier starts (a start can die in a probe). batch_size: measure with this one;
    None lets the process search on. prepare_only: let the system make what it needs once, and end.
    """

    spec: CellSpec
    checkpoint: Path
    scratch: Path
    cache: Path
    prompts: Prompts
    tuning: tuple[TuningProbe, ...] = ()
    batch_size: int | None = None
    prepare_only: bool = False

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(to_json(self)))

    @staticmethod
    def read(path: Path) -> CellProcessJob:
        return decode_as(json.loads(path.read_text()), CellProcessJob, "job")


@dataclass
class CellState:
    """How far a cell has come. Written after every step, so that a killed process leaves what it measured.

    stage: "start", "check", "probe", "load", "warmup", "measure", "report", "done"; "unprepared" when the
    system asks to be prepared outside the cap first.
    status None means the process has not come to an end by itself. load_s: seconds of its longest load.
    """

    stage: str = "start"
    status: Status | None = None
    reason: str = ""
    batch_size: int | None = None
    load_s: float | None = None
    tuning: list[TuningProbe] = field(default_factory=list)
    warmup_samples: list[Sample] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    report: SystemReport = field(default_factory=SystemReport)
    outputs: dict[str, Any] = field(default_factory=dict)
    validity: dict[str, Any] = field(default_factory=dict)
    process: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Replace the file at ``path`` in one step."""
        partial = path.with_suffix(".partial")
        # What JSON has no form for, a system has put into its report: as text.
        partial.write_text(json.dumps(to_json(self), default=str))
        partial.replace(path)

    @staticmethod
    def read(path: Path) -> CellState:
        """The state a process left; that of one not begun if it left none. Raises StoreError for figures of a system
        that are none."""
        return decode_as(json.loads(path.read_text()), CellState, "state") if path.exists() else CellState()
