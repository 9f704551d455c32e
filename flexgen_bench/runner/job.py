"""What the parent hands to a cell's process, and what comes back, as JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from flexgen_bench.core.cell import CellSpec
from flexgen_bench.core.record import LinkUse, Sample, SystemReport, TuningProbe
from flexgen_bench.core.status import Status

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
        data = {
            "spec": self.spec.to_dict(),
            "checkpoint": str(self.checkpoint),
            "scratch": str(self.scratch),
            "cache": str(self.cache),
            "prompts": self.prompts,
            "tuning": [asdict(probe) for probe in self.tuning],
            "batch_size": self.batch_size,
            "prepare_only": self.prepare_only,
        }
        path.write_text(json.dumps(data))

    @staticmethod
    def read(path: Path) -> CellProcessJob:
        data = json.loads(path.read_text())
        return CellProcessJob(
            spec=CellSpec.from_dict(data["spec"]),
            checkpoint=Path(data["checkpoint"]),
            scratch=Path(data["scratch"]),
            cache=Path(data["cache"]),
            prompts=data["prompts"],
            tuning=tuple(TuningProbe(**probe) for probe in data["tuning"]),
            batch_size=data["batch_size"],
            prepare_only=data["prepare_only"],
        )


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
        partial.write_text(json.dumps(_plain(self), default=_plain))
        partial.replace(path)

    @staticmethod
    def read(path: Path) -> CellState:
        """The state a process left; that of one not begun if it left none."""
        if not path.exists():
            return CellState()
        data = json.loads(path.read_text())
        report = data["report"]
        report["links"] = {name: LinkUse(**use) for name, use in report["links"].items()}
        report["notes"] = tuple(report["notes"])
        return CellState(
            **data
            | {
                "status": None if data["status"] is None else Status(data["status"]),
                "tuning": [TuningProbe(**probe) for probe in data["tuning"]],
                "warmup_samples": [Sample(**sample) for sample in data["warmup_samples"]],
                "samples": [Sample(**sample) for sample in data["samples"]],
                "report": SystemReport(**report),
            }
        )


def _plain(value: Any) -> Any:
    """What ``json`` cannot write itself: systems may report read-only mappings, tuples, paths."""
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    return str(value)
