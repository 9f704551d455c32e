"""What compression costs, beside speed: every task of every mode, and for each compressed run its mode's loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_bench.accuracy.compare.compare import Margins
from flexgen_bench.accuracy.compare.outcome import ModelOutcome, ModeOutcome, outcomes
from flexgen_bench.accuracy.compare.statistics import Interval
from flexgen_bench.page.gather import Broken, PageRow
from flexgen_bench.report.accuracy.formatting import advice, verdict_text
from flexgen_bench.report.accuracy.links import evaluated
from flexgen_bench.store.accuracy_store import read_accuracy


@dataclass(frozen=True)
class Accuracy:
    """The outcomes of each results folder, by the folder's name, and records that cannot be used."""

    by_folder: dict[str, list[ModelOutcome]]
    broken: list[Broken]

    def losses(self, rows: Sequence[PageRow]) -> dict[str, list[dict[str, Any]]]:
        """By run, what its compression costs its model: one entry, where that was evaluated."""
        found: dict[str, list[dict[str, Any]]] = {}
        for of in rows:
            if not of.row.lossy:
                continue
            match = evaluated(of.row, self.by_folder.get(of.folder, []))
            if match is not None and match[1].comparison is not None:
                found[of.row.stored.record.run_id] = [_loss(*match)]
        return found

    def tables(self) -> list[dict[str, Any]]:
        """A table a model: its tasks under each mode."""
        return [_table(folder, outcome) for folder, models in self.by_folder.items() for outcome in models]


def gather_accuracy(folders: Sequence[Path], margins: Margins | None = None) -> Accuracy:
    """Raises StoreError if a folder cannot be listed."""
    by_folder, broken = {}, []
    for folder in folders:
        stored = read_accuracy(folder)
        by_folder[str(folder)] = outcomes(stored, margins or Margins())
        broken += [Broken(str(p.path), p.message.removeprefix(f"{p.path} ")) for p in stored.problems]
    return Accuracy(by_folder, broken)


def _loss(outcome: ModelOutcome, mode: ModeOutcome) -> dict[str, Any]:
    score = None if mode.comparison is None else mode.comparison.score
    return {
        "model": outcome.model,
        "mode": mode.mode,
        "verdict": verdict_text(mode),
        "tasks": len(mode.comparison.tasks) if mode.comparison else 0,
        **_interval(score),
    }


def _table(folder: str, outcome: ModelOutcome) -> dict[str, Any]:
    rows = [
        {
            "mode": mode.mode,
            "task": t.task,
            "metric": t.metric,
            "n": t.n,
            "exact": _finite(t.reference),
            "score": _finite(t.score),
            "bounded": t.bounded,
            "verdict": str(t.verdict),
            "evidence": mode.tasks[t.task].evidence.value,
            "rerun": mode.tasks[t.task].rerun_command,
            **_interval(t.change),
        }
        for mode in outcome.modes
        for t in (mode.comparison.tasks if mode.comparison else ())
    ]
    return {
        "folder": folder,
        "model": outcome.model,
        "system": outcome.system,
        "dtype": outcome.dtype,
        "advice": advice(outcome),
        "margins": str(outcome.margins),
        "rows": rows,
        "problems": list(outcome.problems),
    }


def _interval(of: Interval | None) -> dict[str, float | None]:
    """A change with its 95 % interval; nulls where it is not known."""
    if of is None:
        return {"change": None, "low": None, "high": None}
    return {"change": _finite(of.value), "low": _finite(of.low), "high": _finite(of.high)}


def _finite(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
