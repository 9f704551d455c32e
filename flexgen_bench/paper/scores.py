"""Accuracy beside the paper's: what was measured here under the same setting, from the records of accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexgen_bench.core.accuracy import TaskRecord
from flexgen_bench.core.status import Evidence

Key = tuple[str, str, str, str]  # model, system, mode, task


@dataclass(frozen=True)
class Score:
    """source: the record, seen from the results folder. settings: dtype and items."""

    value: float
    evidence: Evidence
    source: str
    settings: str


class Scores:
    """Records of accuracy by what they are of; of several the one with most items."""

    def __init__(self, records: Sequence[tuple[Path, TaskRecord]], results_dir: Path) -> None:
        self._results_dir = results_dir
        self._newest: dict[Key, tuple[Path, TaskRecord]] = {}
        for path, record in sorted(records, key=lambda r: (len(r[1].items), r[1].ended_utc)):
            subject = record.subject
            self._newest[subject.model, subject.system, subject.mode, record.task] = (path, record)

    def find(self, model: str, system: str, mode: str, task: str, metric: str) -> Score | None:
        """None where nothing was evaluated, or the task has no such metric."""
        score = self._newest.get((model, system, mode, task))
        value = None if score is None else score[1].scores.get(metric)
        if score is None or value is None:
            return None
        path, record = score
        source = path.relative_to(self._results_dir).as_posix()
        settings = f"{record.subject.dtype}, {len(record.items)} items"
        return Score(value, record.evidence, source, settings)
