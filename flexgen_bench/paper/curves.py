"""What a plot of a table shows: curves of printed, simulated and recorded values."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from flexgen_bench.config.schema import FigureConf
from flexgen_bench.core.digits import settled
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.status import Evidence
from flexgen_bench.paper.cells import Cell, Counterpart
from flexgen_bench.paper.table import PaperTable
from flexgen_bench.published.quoted import FIELDS

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]*")
# What two cells of one point have in common, whatever is told of it.
_POINT = ("system", "model", "prompt_len", "gen_len", "gpus", "policy")


@dataclass(frozen=True)
class Curve:
    """``kind``: printed, simulated or ours; ``series``: index of what the curve is of, for its colour. points: by x."""

    label: str
    kind: str
    series: int
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Plot:
    title: str
    x: str
    y: str
    log: bool
    curves: tuple[Curve, ...]


def plot(table: PaperTable, conf: FigureConf) -> Plot:
    """Raises UserError for an axis that the table does not have, and for a name that is no file's."""
    if _NAME.fullmatch(conf.name) is None:
        raise UserError("table.figures.name", conf.name, "of letters, digits, dashes")
    quantities = list(dict.fromkeys(c.published.quantity for c in table.cells))
    if conf.y not in quantities:
        raise unknown_choice(f"table.figures.{conf.name}.y", conf.y, quantities)
    if conf.x not in quantities and conf.x not in FIELDS:
        raise unknown_choice(f"table.figures.{conf.name}.x", conf.x, [*quantities, *FIELDS])
    rows = [c for c in table.cells if c.published.quantity == conf.y and c.published.matches(conf.where)]
    names = list(dict.fromkeys(_series(table, conf, c) for c in rows))
    curves = []
    for index, name in enumerate(names):
        mine = [c for c in rows if _series(table, conf, c) == name]
        # Nobody but one kind has values here: the name says enough.
        alone = sum(any(value_of(c)[0] is not None for c in mine) for value_of in _KINDS.values()) == 1
        alone = alone and all(c.published.number is None for c in mine)
        for kind, value_of in _KINDS.items():
            for evidence in dict.fromkeys(e for c in mine if (e := value_of(c)[1]) is not None):
                points = [
                    (x, y)
                    for c in mine
                    for y, how in [value_of(c)]
                    if how is evidence and y is not None
                    for x in [_x(table, conf, c, value_of)]
                    if x is not None and (not conf.log or (x > 0 and y > 0))
                ]
                words = name if alone else f"{name}, {kind}"
                if points:
                    curves.append(Curve(f"{words} ({evidence.value})", kind, index, tuple(sorted(points))))
    axis = _unit(table, conf.x)
    return Plot(conf.title, axis, _unit(table, conf.y), conf.log, tuple(curves))


_ValueOf = Callable[[Cell], tuple[float | None, Evidence | None]]


def _counterpart(other: Counterpart) -> tuple[float | None, Evidence | None]:
    """Settled, as points are put in order: two that have one x must have it on every machine."""
    return None if other.value is None else settled(other.value), other.evidence


_KINDS: dict[str, _ValueOf] = {
    "printed": lambda c: (c.published.number, Evidence.QUOTED),
    "simulated": lambda c: _counterpart(c.simulated),
    "this engine": lambda c: _counterpart(c.ours),
}


def _series(table: PaperTable, conf: FigureConf, cell: Cell) -> str:
    return ", ".join(table.label(f, cell.published.text(f)) for f in conf.series)


def _x(table: PaperTable, conf: FigureConf, cell: Cell, value_of: _ValueOf) -> float | None:
    if conf.x in FIELDS:
        text = cell.published.text(conf.x)
        return float(text) if text.isascii() and text.isdigit() else None
    same = [cell.published.text(f) for f in _POINT]
    for other in table.cells:
        if other.published.quantity == conf.x and [other.published.text(f) for f in _POINT] == same:
            return value_of(other)[0]
    return None


def _unit(table: PaperTable, name: str) -> str:
    """An axis's name with the unit of its quantity; ``labels`` may name it otherwise: ``axis=gen_len``."""
    units = [c.published.unit for c in table.cells if c.published.quantity == name]
    shown = table.conf.labels.get(f"axis={name}", name.replace("_", " "))
    return f"{shown} ({units[0]})" if units and units[0] else shown
