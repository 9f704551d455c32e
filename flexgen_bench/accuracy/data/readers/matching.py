"""Entity matching (Tables 10 and 11 of the paper): pairs of records from ``py-entitymatching``, labelled by its
authors.

Records are written as in the published prompts of "Can Foundation Models Wrangle Your Data?" (Narayan et al. 2022),
which the paper's application uses: ``attribute: value`` joined by ". ".
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from flexgen_bench.accuracy.data.readers.products import balanced
from flexgen_bench.accuracy.data.rows import Rows


def restaurants(folder: Path, *, examples: int) -> Rows:
    """Fodors-Zagats: the labelled pairs, and all known matches that are not among them. Attributes: name, addr, city,
    phone."""
    rows, seen = [], set()
    for name in ("lbl_restnt_wf1.csv", "match_fodors_zagats_more_attrs.csv"):
        for raw in _table(folder, name):
            left, right = (serialize(_sides(raw, f"{side}table_", ("name", "addr", "city", "phone"))) for side in "lr")
            if (left, right) not in seen:
                seen.add((left, right))
                rows.append({"left": left, "right": right, "label": int(raw["gold"])})
    return balanced(rows, examples)


def publications(folder: Path, *, examples: int) -> Rows:
    """DBLP-ACM: labelled pairs of publications. Attributes: title, authors, venue, year."""
    rows = []
    for raw in _table(folder, "dblp_acm_demo_labels.csv"):
        sides = []
        for side in "lr":
            record = _sides(raw, f"{side}table.", ("title", "authors", "venue", "year"))
            sides.append(serialize({**record, "year": record["year"].removesuffix(".0")}))
        rows.append({"left": sides[0], "right": sides[1], "label": int(float(raw["gold"]))})
    return balanced(rows, examples)


def serialize(record: Mapping[str, str]) -> str:
    """``name: arnie mortons. city: los angeles``; a missing value is "nan", as published."""
    return ". ".join(f"{key}: {value.strip() or 'nan'}" for key, value in record.items())


def _sides(raw: Mapping[str, str], prefix: str, attributes: Sequence[str]) -> dict[str, str]:
    return {name: raw[f"{prefix}{name}"] or "" for name in attributes}


def _table(folder: Path, name: str) -> Iterable[Mapping[str, str]]:
    path = next(iter(sorted(folder.rglob(name))))
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        yield from csv.DictReader(file)
