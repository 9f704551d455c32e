"""Pictures of the rows as the page reads them: what the pictures' room makes of records, points short and with their
rows, so that the page can filter them and open their cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexgen_bench.accuracy.compare.outcome import ModelOutcome
from flexgen_bench.page.gather import PageRow
from flexgen_bench.pictures.gallery import data
from flexgen_bench.pictures.gather import Material, material

Json = dict[str, Any]
_NO_ROW = -1


def document(rows: Sequence[PageRow], accuracy: Mapping[str, Sequence[ModelOutcome]]) -> Json:
    """Every picture that the newest rows give, and for the others what is missing. accuracy: by results folder."""
    parts = []
    for folder in dict.fromkeys([*(of.folder for of in rows), *accuracy]):
        newest = [of.row.stored for of in rows if of.newest and of.folder == folder]
        parts.append(material(newest, accuracy.get(folder, ()), (), Path(folder)))
    runs = tuple(run for part in parts for run in part.runs)
    outcomes = tuple(outcome for part in parts for outcome in part.accuracy)
    return data(Material(runs, outcomes))


def compact(document: Json, rows: Sequence[PageRow]) -> Json:
    """The document with points as [row, x, y, x low, x high, y low, y high, label]: a tenth of the size."""
    places = {of.row.stored.record.run_id: place for place, of in reversed(list(enumerate(rows)))}

    def point(p: Mapping[str, Any]) -> list[Any]:
        ends = [*(p["x_range"] or (None, None)), *(p["y_range"] or (None, None))]
        place = places.get(p["run_id"], _NO_ROW)
        return [place, *map(_short, (p["x"], p["y"], *ends)), *([p["label"]] if p["label"] else [])]

    def failure(f: Mapping[str, Any]) -> list[Any]:
        return [places.get(f["run_id"], _NO_ROW), _short(f["x"]), f["status"], f["reason"]]

    pictures = [
        picture
        | {
            "panels": [
                panel
                | {
                    "series": [
                        one
                        | {"points": list(map(point, one["points"]))}
                        | {"failures": list(map(failure, one.get("failures", ())))}
                        for one in panel["series"]
                    ],
                    "guides": [g | {"points": [list(map(_short, at)) for at in g["points"]]} for g in panel["guides"]],
                }
                for panel in picture["panels"]
            ]
        }
        for picture in document["pictures"]
    ]
    return {"pictures": pictures, "missing": document["missing"]}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
