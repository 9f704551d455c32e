"""Pairs of product titles (``evals``): the same product or not."""

from __future__ import annotations

import json
import re
from pathlib import Path

from flexgen_bench.accuracy.data.rows import Rows, ordered

_PAIR = re.compile(r"Product 1: '(?:Title: )?(.*)'\nProduct 2: '(?:Title: )?(.*)'$", re.DOTALL)


def titles(folder: Path, *, examples: int = 0) -> Rows:
    """``left``, ``right``: two titles; label: 1 if they name the same product."""
    rows = []
    for path in sorted(folder.rglob("samples.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            doc = json.loads(line)
            pair = _PAIR.search(doc["input"][-1]["content"])
            if pair is None:
                raise ValueError(f"{path}: no two products in {line[:200]}")
            # Some titles were quoted twice.
            left, right = (pair[side].replace('\\"', '"').strip() for side in (1, 2))
            rows.append({"left": left, "right": right, "label": int(doc["ideal"] == "Yes")})
    return balanced(rows, examples)


def balanced(rows: list[dict[str, object]], examples: int) -> Rows:
    """Rows in their order; the examples shown are matches and others in turn."""
    mixed = ordered(rows)
    if not examples:
        return {"test": mixed}
    groups = [[row for row in mixed if row["label"] == label] for label in (1, 0)]
    shown = [groups[i % 2][i // 2] for i in range(examples)]
    return {"fewshot": shown, "test": [row for row in mixed if row not in shown]}
