"""A table laid out as the paper has it: its rows and columns, with a line below each printed one for what stands
beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexgen_bench.core.digits import fixed, rounded
from flexgen_bench.core.status import Evidence
from flexgen_bench.paper.cells import NOTHING, Cell, Counterpart
from flexgen_bench.paper.table import PaperTable, places
from flexgen_bench.published.quoted import NOT_FOUND, NOT_PRINTED
from flexgen_bench.report.cells import MARKS, number

Key = tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """What one place of the grid shows, with the numbers of its footnotes."""

    text: str
    notes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Line:
    """One line: the row's names (empty below the first line of a row), what the line is, its evidence, an entry per
    column."""

    names: Key
    what: str
    evidence: str
    entries: tuple[tuple[Entry, ...], ...]


@dataclass(frozen=True)
class Grid:
    """title: what sets this grid apart from the table's others. columns: the names of each column, outermost first."""

    title: str
    row_names: Key
    columns: tuple[Key, ...]
    lines: tuple[Line, ...]


def grids(table: PaperTable) -> list[Grid]:
    """The table's grids, in the order of their first cells."""
    field = table.conf.grids
    if field is None:
        return [_grid(table, "", table.cells)]
    values = list(dict.fromkeys(c.published.text(field) for c in table.cells))
    return [
        _grid(table, table.label(field, v), [c for c in table.cells if c.published.text(field) == v]) for v in values
    ]


def published_text(cell: Cell, decimals: int | None) -> str:
    """The printed value with the paper's number of decimals: zeros are added, nothing is rounded."""
    text = cell.published.value
    if cell.published.number is None or decimals is None:
        return {NOT_FOUND: "not found", NOT_PRINTED: NOTHING}.get(text, text)
    have = len(text.partition(".")[2])
    return text if have >= decimals else f"{float(text):.{decimals}f}"


def counterpart_text(cell: Cell, other: Counterpart, *, marked: bool = False) -> str:
    """``24.8 (0.98x)``: the value, and what it is of the printed one; or the word for why there is none."""
    mark = f" ({MARKS[other.evidence]})" if marked and other.evidence and MARKS[other.evidence] else ""
    if other.value is None:
        return other.word + mark
    ratio = cell.ratio(other)
    return number(other.value) + mark + ("" if ratio is None else f" ({ratio_text(ratio)}x)")


def ratio_text(ratio: float) -> str:
    """Two decimals, fewer where they say nothing, more where they would all be zeros."""
    return number(ratio) if not 0.1 <= rounded(ratio, 3) < 10 else fixed(ratio, 2)


def _grid(table: PaperTable, title: str, cells: Sequence[Cell]) -> Grid:
    def key(cell: Cell, fields: Sequence[str]) -> Key:
        return tuple(cell.published.text(f) for f in fields)

    def shown(fields: Sequence[str], values: Key) -> Key:
        return tuple(table.label(f, v) for f, v in zip(fields, values, strict=True))

    rows, columns = table.conf.rows, table.conf.columns
    placed: dict[Key, dict[Key, list[Cell]]] = {}
    for cell in cells:
        placed.setdefault(key(cell, rows), {}).setdefault(key(cell, columns), []).append(cell)
    shown_rows = [c.published for c in cells]
    order = list(places(table.conf, shown_rows, columns))
    lines: list[Line] = []
    for names in places(table.conf, shown_rows, rows):
        row = placed[names]
        at = [row.get(column, []) for column in order]
        grid_lines = [line for kind in table.conf.lines for line in _lines(table, kind, at)]
        grid_lines = [line for line in grid_lines if _says_something(line)] or grid_lines[:1]
        blank = ("",) * len(rows)
        for index, line in enumerate(grid_lines):
            first = shown(rows, names) if index == 0 else blank
            lines.append(Line(first, line.what, line.evidence, line.entries))
    return Grid(title, tuple(rows), tuple(shown(columns, c) for c in order), tuple(lines))


def _lines(table: PaperTable, kind: str, at: Sequence[Sequence[Cell]]) -> list[Line]:
    """The line of one kind; of the engine's, one for each way in which it may change results."""
    if kind == "printed":
        return [_published(table, at)]
    if kind == "policy":
        entries = tuple(tuple(Entry(c.published.policy or NOTHING) for c in place) for place in at)
        return [Line((), "policy", Evidence.QUOTED.value, entries)]
    if kind == "simulated":
        return [_counterpart("simulated", at, lambda c: c.simulated)]
    changes = dict.fromkeys(c.ours_lossy for place in at for c in place if c.ours != Counterpart())
    lines = []
    for lossy in changes:
        name = f"this engine, {lossy}" if lossy else "this engine"
        of = [[c for c in place if c.ours_lossy == lossy] for place in at]
        if kind == "ours":
            lines.append(_counterpart(name, of, lambda c: c.ours))
        else:
            entries = tuple(tuple(Entry(c.ours.settings or NOTHING) for c in p) for p in of)
            kinds = dict.fromkeys(c.ours.evidence for p in of for c in p if c.ours.evidence)
            lines.append(Line((), f"{name}: settings", " and ".join(kinds) or NOTHING, entries))
    return lines


def _published(table: PaperTable, at: Sequence[Sequence[Cell]]) -> Line:
    decimals = table.conf.decimals
    entries = tuple(
        tuple(Entry(published_text(c, decimals), c.notes if c.published.value else ()) for c in place) for place in at
    )
    trust = dict.fromkeys(c.published.trust for place in at for c in place if c.published.trust)
    quoted = any(c.published.value not in (NOT_PRINTED, NOT_FOUND) for place in at for c in place)
    evidence = f"{Evidence.QUOTED.value} ({'; '.join(trust)})" if trust else Evidence.QUOTED.value
    return Line((), "printed", evidence if quoted else NOTHING, entries)


def _counterpart(what: str, at: Sequence[Sequence[Cell]], pick: Callable[[Cell], Counterpart]) -> Line:
    kinds = dict.fromkeys(e for place in at for c in place if (e := pick(c).evidence) is not None)
    entries = tuple(
        tuple(dict.fromkeys(Entry(counterpart_text(c, pick(c), marked=len(kinds) > 1)) for c in place)) for place in at
    )
    return Line((), what, " and ".join(kinds) or NOTHING, entries)


def _says_something(line: Line) -> bool:
    return any(entry.text != NOTHING for place in line.entries for entry in place)
