"""From the speed of a compressed system to what its compression costs."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_bench.accuracy.compare.outcome import ModelOutcome, ModeOutcome
from flexgen_bench.report.accuracy.formatting import points_interval, verdict_text
from flexgen_bench.report.accuracy.page import page_name
from flexgen_bench.report.rows import Row
from flexgen_bench.report.same_tokens import lossy_of
from flexgen_bench.report.table import escape


def accuracy_lines(rows: Sequence[Row], outcomes: Sequence[ModelOutcome], folder: str) -> list[str]:
    """A section of a suite's page: for each compressed system and model, its accuracy, or how to get it. Empty where
    nothing is compressed."""
    lines = dict.fromkeys(_line(row, outcomes, folder) for row in rows if row.lossy)
    return ["## Accuracy of compressed systems", "", *lines, ""] if lines else []


def _line(row: Row, outcomes: Sequence[ModelOutcome], folder: str) -> str:
    name = f"- {escape(row.model)}, {escape(row.label)}: "
    found = evaluated(row, outcomes)
    if found is None:
        return (
            f"{name}not evaluated yet: `python -m flexgen_bench.accuracy model={row.model} mode=...` (--help lists "
            "the modes)"
        )
    outcome, mode = found
    change = points_interval(mode.comparison.score) if mode.comparison else "-"
    what = f"mean change {change} points, {verdict_text(mode)} within {outcome.margins}"
    link = f"[mode {escape(mode.mode)}]({folder}/{page_name(outcome)}.md)"
    return f"{name}{link}: {escape(what)} (MEASURED, {escape(mode.subject.dtype)})"


def evaluated(row: Row, outcomes: Sequence[ModelOutcome]) -> tuple[ModelOutcome, ModeOutcome] | None:
    """The same model, system and change; of several dtypes the row's own."""
    lossy = lossy_of(row.stored.record)
    matching = [
        (outcome, mode)
        for outcome in outcomes
        if (outcome.model, outcome.system) == (row.model, row.system)
        for mode in outcome.modes
        if mode.lossy == lossy
    ]
    return max(matching, key=lambda f: f[1].subject.dtype == row.dtype, default=None)
