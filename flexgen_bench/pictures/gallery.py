"""Every picture by its name: what there is to show of it, and what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.pictures.accuracy_speed import accuracy_speed
from flexgen_bench.pictures.gather import Material
from flexgen_bench.pictures.latency import LATENCIES, throughput_latency
from flexgen_bench.pictures.memory import memory
from flexgen_bench.pictures.picture import Found, Picture, Series
from flexgen_bench.pictures.predicted import predicted_measured
from flexgen_bench.pictures.price import price
from flexgen_bench.pictures.run import Run

_MAKERS: Mapping[str, Callable[[Material], Found]] = {
    **{one.name: partial(throughput_latency, latency=one) for one in LATENCIES},
    "memory": memory,
    "price": price,
    "accuracy-speed": accuracy_speed,
    "predicted-measured": predicted_measured,
}
NAMES = tuple(_MAKERS)


@dataclass(frozen=True)
class Wanted:
    """Which runs a picture may be made of; empty: all. machine: part of its name, or the name of its hardware; model,
    workload, system: whole names."""

    machine: str = ""
    model: str = ""
    workload: str = ""
    system: str = ""

    def fits(self, run: Run) -> bool:
        machine = self.machine.lower()
        return (
            (not machine or machine in run.setting.machine.lower() or machine == run.hardware.lower())
            and self.model in ("", run.setting.model)
            and self.workload in ("", run.workload)
            and self.system in ("", run.system)
        )


def pictures(name: str, material: Material, wanted: Wanted | None = None) -> Found:
    """All pictures of one kind: one for each machine, model and workload, since these are never mixed.

    Raises UserError for an unknown name, and for a wish that no run fulfils: it lists what there is.
    """
    if name not in _MAKERS:
        raise unknown_choice("picture", name, NAMES)
    if not material.runs and not material.accuracy:
        return Found((), ("there are no records: measure something first (python -m flexgen_bench)",))
    return _MAKERS[name](_chosen(material, wanted or Wanted()))


def data(material: Material, wanted: Wanted | None = None) -> dict[str, Any]:
    """All pictures as JSON values (docs/notes/pictures.md), with what is missing and which files could not be used."""
    found = {name: pictures(name, material, wanted) for name in NAMES}
    return {
        "pictures": [picture_json(picture) for one in found.values() for picture in one.pictures],
        "missing": {name: list(one.missing) for name, one in found.items() if one.missing},
        "problems": [problem.message for problem in material.problems],
    }


def picture_json(picture: Picture) -> dict[str, Any]:
    """One picture as JSON values; of its series also the labels."""
    values: dict[str, Any] = to_json(picture)
    for panel, written in zip(picture.panels, values["panels"], strict=True):
        written["series"] = [_series_json(one, out) for one, out in zip(panel.series, written["series"], strict=True)]
    return values


def _series_json(one: Series, written: dict[str, Any]) -> dict[str, Any]:
    for kind in ("points", "failures"):
        written[kind] = [{**{k: v for k, v in p.items() if k != "source"}, **p["source"]} for p in written[kind]]
    return {"label": one.label, **written}


def _chosen(material: Material, wanted: Wanted) -> Material:
    """Raises UserError naming the first wish that nothing fulfils."""
    if wanted == Wanted():
        return material
    for field in ("machine", "model", "workload", "system"):
        value = getattr(wanted, field)
        if value and not any(Wanted(**{field: value}).fits(run) for run in material.runs):
            raise unknown_choice(field, value, _known(field, material))
    runs = tuple(run for run in material.runs if wanted.fits(run))
    if not runs:
        wishes = ", ".join(f"{k}={v}" for k, v in vars(wanted).items() if v)
        raise UserError("picture", wishes, "something that one record fulfils at once", "Ask for less.")
    kept = [a for a in material.accuracy if wanted.model in ("", a.model) and wanted.system in ("", a.system)]
    return replace(material, runs=runs, accuracy=tuple(kept))


def _known(field: str, material: Material) -> set[str]:
    values: dict[str, Callable[[Run], str]] = {
        "machine": lambda run: run.setting.machine or run.hardware,
        "model": lambda run: run.setting.model,
        "workload": lambda run: run.workload,
        "system": lambda run: run.system,
    }
    return {values[field](run) for run in material.runs}
