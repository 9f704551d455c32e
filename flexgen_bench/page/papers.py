"""The papers' tables as the page shows them: printed values with what is known beside them, laid out as in print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexgen_bench.config.paths import shipped_predictions
from flexgen_bench.paper.build import known_tables
from flexgen_bench.paper.details import reasons
from flexgen_bench.paper.grid import Entry, Grid, grids
from flexgen_bench.paper.markdown import LEGEND
from flexgen_bench.paper.table import PaperTable
from flexgen_bench.store.reader import StoredRecord

_PENDING = "pending = nobody has predicted it yet: python -m flexgen_bench report does."


def paper_tables(records: Sequence[StoredRecord], results_dir: Path, names: Sequence[str] | None) -> dict[str, Any]:
    """The tables ``names`` (None: all) by what is known; nothing is predicted for them. Tables that cannot be are named
    with what is wrong."""
    tables, errors = known_tables(records, results_dir, shipped_predictions(), names)
    return {"legend": [*LEGEND, _PENDING], "tables": [_table(t) for t in tables], "errors": [str(e) for e in errors]}


def _table(table: PaperTable) -> dict[str, Any]:
    return {
        "name": table.name,
        "title": table.conf.title,
        "grids": [_grid(grid) for grid in grids(table)],
        "notes": list(table.notes),
        "remarks": [*table.remarks, *reasons(table)],
    }


def _grid(grid: Grid) -> dict[str, Any]:
    return {
        "title": grid.title,
        "names": [name.replace("_", " ") for name in grid.row_names],
        "columns": [", ".join(filter(None, names)) for names in grid.columns],
        "lines": [
            {
                "names": list(line.names),
                "what": line.what,
                "evidence": line.evidence,
                "cells": [" / ".join(map(_entry, place)) or "-" for place in line.entries],
            }
            for line in grid.lines
        ],
    }


def _entry(entry: Entry) -> str:
    return entry.text + (f" [{','.join(map(str, entry.notes))}]" if entry.notes else "")
