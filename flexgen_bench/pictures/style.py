"""How each series looks: colour says the system, shape what else it is of, filling the evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexgen_bench.core.status import Evidence
from flexgen_bench.pictures.picture import Guide, Series

# Told apart without seeing red and green apart (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
# How much of a marker is filled.
FILLS = {
    Evidence.MEASURED: "full",
    Evidence.EMULATED: "left",
    Evidence.PROJECTED: "bottom",
    Evidence.SIMULATED: "none",
    Evidence.QUOTED: "top",
}
GREY = "#555555"
Key = tuple[str, str, str, Evidence]


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str
    fill: str
    dashed: bool


Styles = Mapping[Key, Style]


def styles_of(series: Sequence[Series], systems: Sequence[str]) -> Styles:
    """Colours by system, shapes by what else a series is of: compression, machine. With more systems than colours the
    next ones have other shapes."""
    systems = list(dict.fromkeys((*systems, *sorted(one.system for one in series))))
    kinds = list(dict.fromkeys(sorted((one.lossy, one.of) for one in series)))
    return {
        key_of(one): Style(
            COLOURS[systems.index(one.system) % len(COLOURS)],
            MARKERS[_shape(systems.index(one.system), kinds.index((one.lossy, one.of)), len(kinds))],
            FILLS[one.evidence],
            bool(one.lossy),
        )
        for one in series
    }


def _shape(system: int, kind: int, kinds: int) -> int:
    return (kind + system // len(COLOURS) * kinds) % len(MARKERS)


def key_of(one: Series) -> Key:
    """What decides how a series looks."""
    return one.system, one.lossy, one.of, one.evidence


def marks(style: Style) -> dict[str, Any]:
    """What matplotlib is told of a series."""
    return {
        "color": style.colour,
        "marker": style.marker,
        "fillstyle": style.fill,
        "markerfacecoloralt": "white",
        "markersize": 5,
        "markeredgewidth": 0.9,
        "linewidth": 1.1,
    }


def guide_marks(guide: Guide, number: int) -> dict[str, Any]:
    """The same of the ``number``-th guide of a panel."""
    if len(guide.points) == 1:
        return {"color": GREY, "marker": "+", "markersize": 8, "linestyle": "none"}
    drawn = {"color": GREY, "linestyle": (":", "-.")[number % 2], "linewidth": 0.9}
    return {**drawn, "drawstyle": "steps-post"} if guide.stepped else drawn
