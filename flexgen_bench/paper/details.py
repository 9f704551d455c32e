"""Every cell of a table in a row of its own, with all that is known of it: for the CSV, and below the grid."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_bench.core.digits import SCORE, TIMED, significant
from flexgen_bench.paper.cells import Cell, Counterpart
from flexgen_bench.paper.grid import published_text, ratio_text
from flexgen_bench.paper.table import PaperTable
from flexgen_bench.published.quoted import NOT_FOUND, NOT_PRINTED

HEADERS = (
    "table",
    "system",
    "model",
    "prompt_len",
    "gen_len",
    "gpus",
    "metric",
    "unit",
    "printed",
    "printed_evidence",
    "trust",
    "printed_source",
    "policy",
    "unrounded",
    "assumed",
    "simulated",
    "simulated_evidence",
    "simulated_ratio",
    "simulated_source",
    "simulated_settings",
    "ours",
    "ours_evidence",
    "ours_ratio",
    "ours_lossy",
    "ours_source",
    "ours_settings",
    "notes",
)


def details(table: PaperTable) -> list[tuple[str, ...]]:
    """One row per cell, in the order of ``HEADERS``; numbers with the digits that mean something."""
    return [_row(table, cell) for cell in table.cells]


def reasons(table: PaperTable) -> list[str]:
    """Why there is no number, each reason once."""
    all_reasons = [b.reason for c in table.cells for b in (c.simulated, c.ours) if b.reason]
    return list(dict.fromkeys(" ".join(reason.split()) for reason in all_reasons))


def _row(table: PaperTable, cell: Cell) -> tuple[str, ...]:
    row = cell.published
    return (
        row.table,
        row.system,
        row.model,
        row.prompt_len,
        row.gen_len,
        row.gpus,
        row.metric,
        row.unit,
        published_text(cell, None),
        "-" if row.value in (NOT_PRINTED, NOT_FOUND) else "QUOTED",
        row.trust,
        row.source,
        row.policy,
        "" if cell.unrounded is None else significant(cell.unrounded, SCORE),
        cell.assumed,
        *_counterpart(cell, cell.simulated),
        cell.simulated.source,
        cell.simulated.settings,
        *_counterpart(cell, cell.ours),
        cell.ours_lossy or ("" if cell.ours == Counterpart() else "exact"),
        cell.ours.source,
        cell.ours.settings,
        " ".join(map(str, cell.notes)),
    )


def _counterpart(cell: Cell, other: Counterpart) -> Sequence[str]:
    ratio = cell.ratio(other)
    return (
        other.word if other.value is None else significant(other.value, TIMED),
        "-" if other.evidence is None else other.evidence.value,
        "" if ratio is None else ratio_text(ratio),
    )
