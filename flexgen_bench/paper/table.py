"""A table of the paper with everything that is shown of it: cells, footnotes, and the order of the paper."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flexgen_bench.config.paths import list_models
from flexgen_bench.config.schema import AssumedConf, NoteConf, TableConf
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.paper.cells import Cell, Sources, build_cell
from flexgen_bench.paper.quantities import check_quantity
from flexgen_bench.published.policy_text import parse_policy
from flexgen_bench.published.quoted import COLUMNS, FIELDS, Quoted, check, of_tables

LINES = ("printed", "policy", "simulated", "ours", "settings")


@dataclass(frozen=True)
class PaperTable:
    """notes: numbered from 1, put at cells. remarks: said of the whole table."""

    name: str
    conf: TableConf
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]
    remarks: tuple[str, ...]

    def label(self, field: str, value: str) -> str:
        """How the value of a field is shown: ``labels`` may name ``field=value``, or the value alone."""
        labels = self.conf.labels
        return labels.get(f"{field}={value}", labels.get(value, value))


def build_table(
    name: str, conf: TableConf, quoted: Sequence[Quoted], footnotes: Mapping[str, str], sources: Sources
) -> PaperTable:
    """Raises UserError for a table that cannot be: see ``check_table``, and a condition that no cell meets."""
    check_table(conf, sources)
    rows = _rows(name, conf, quoted)
    for field, conditions in (
        ("table.notes", [n.where for n in conf.notes]),
        ("table.assumed", [a.where for a in conf.assumed]),
    ):
        for condition in conditions:
            if not any(row.matches(condition) for row in rows):
                raise UserError(f"{field}.where", dict(condition), "met by a cell of the table")
    _known("table.systems", conf.systems, sorted({row.system for row in rows}))
    _known("table.models", conf.models, sorted({row.model for row in rows}))
    own = [metric for metric in conf.predict if metric not in TableConf().predict]
    _known("table.predict", own, sorted({m for row in rows for m in (row.metric, row.quantity)}))
    texts = [_text(note, footnotes) for note in conf.notes]
    at = {id(row): _at(row, conf.notes, texts) for row in rows}
    numbers = {text: n for n, text in enumerate(_in_reading_order(conf, rows, at), 1)}
    cells = tuple(build_cell(row, conf, sources, tuple(sorted(numbers[text] for text in at[id(row)]))) for row in rows)
    remarks = [t for t, note in zip(texts, conf.notes, strict=True) if not note.where]
    return PaperTable(name, conf, cells, tuple(numbers), tuple(remarks))


def check_table(conf: TableConf, sources: Sources) -> None:
    """Raises UserError for a name that nothing has: a field, a line, a quantity, a system."""
    requested = {
        "table.rows": conf.rows,
        "table.columns": conf.columns,
        "table.grids": [conf.grids] if conf.grids is not None else [],
        "table.select": conf.select,
        "table.notes.where": [f for n in conf.notes for f in n.where],
        "table.assumed.where": [f for a in conf.assumed for f in a.where],
        "table.figures.series": [f for figure in conf.figures for f in figure.series],
        "table.figures.where": [f for figure in conf.figures for f in figure.where],
    }
    for key, names in requested.items():
        _known(key, names, FIELDS)
    _known("table.lines", conf.lines, LINES)
    _known("table.extra", [f for cell in conf.extra for f in cell], COLUMNS)
    for key in ("rows", "columns", "lines"):
        if not getattr(conf, key):
            raise UserError(f"table.{key}", [], "at least one")
    axes = [*requested["table.rows"], *requested["table.columns"], *requested["table.grids"]]
    twice = [field for field in axes if axes.count(field) > 1]
    if twice:
        raise UserError("table.rows, columns and grids", twice[0], "a field named once in all")
    for metric, name in conf.predict.items():
        check_quantity(name, f"table.predict.{metric}")
    _check_values(conf)
    simulations = sources.simulations
    if simulations is None:
        return
    if simulations.named(conf.engine) is None:
        raise unknown_choice("table.engine", conf.engine, [s.name for s in simulations.systems])
    system_names = [s.printed_as for s in simulations.systems if s.printed_as is not None]
    for system, other in conf.systems.items():
        if other.simulated_as is not None and other.simulated_as not in system_names:
            key = f"table.systems.{system}.simulated_as"
            raise unknown_choice(key, other.simulated_as, system_names)


def _check_values(conf: TableConf) -> None:
    if not conf.accuracy:  # models whose accuracy was measured need not be in conf/model
        for name, model in conf.models.items():
            _known(f"table.models.{name}", [model], list_models())
    for index, assumed in enumerate(conf.assumed):
        _check_assumed(assumed, f"table.assumed[{index}]")


def _check_assumed(assumed: AssumedConf, where: str) -> None:
    """Raises UserError for a count or a value below what can be, and for words in a policy that set nothing: beside a
    printed policy they are remarks, here nobody else has written them."""
    if assumed.num_prompts is not None and assumed.num_prompts < 1:
        raise UserError(f"{where}.num_prompts", assumed.num_prompts, "at least 1")
    if assumed.unrounded is not None and not 0 < assumed.unrounded < math.inf:
        raise UserError(f"{where}.unrounded", assumed.unrounded, "a finite number above 0")
    remarks = parse_policy(assumed.policy or "").remarks
    if remarks:
        raise UserError(f"{where}.policy", remarks[0], "a setting, such as bs=48x3, pct=..., cpu attention")


def _known(key: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise unknown_choice(key, name, known)


def places(conf: TableConf, rows: Sequence[Quoted], fields: Sequence[str]) -> dict[tuple[str, ...], int]:
    """The different values of ``fields`` and the place of each: as ``select`` orders them, otherwise as they come."""
    keys = dict.fromkeys(tuple(row.text(f) for f in fields) for row in rows)
    selects = [conf.select.get(f, []) for f in fields]

    def place(key: tuple[str, ...]) -> list[int]:
        pairs = zip(key, selects, strict=True)
        return [values.index(v) if v in values else 0 for v, values in pairs]

    return {key: index for index, key in enumerate(sorted(keys, key=place))}


def _rows(name: str, conf: TableConf, quoted: Sequence[Quoted]) -> list[Quoted]:
    """The printed rows that are selected, and the extra ones, in the order in which ``select`` names values."""
    rows = of_tables(quoted, conf.printed)
    for index, cell in enumerate(conf.extra):
        row = Quoted(**(dict.fromkeys(COLUMNS, "") | {"table": name} | cell))
        check(row, f"table.extra[{index}]")
        rows.append(row)
    for field, values in conf.select.items():
        for value in values:
            if not any(row.text(field) == value for row in rows):
                known = {row.text(field) for row in rows}
                raise unknown_choice(f"table.select.{field}", value, known)
    rows = [r for r in rows if all(r.text(f) in v for f, v in conf.select.items())]
    if not rows:
        raise UserError("table.select", dict(conf.select), "met by a row of the printed values")
    return sorted(rows, key=lambda row: [v.index(row.text(f)) for f, v in conf.select.items()])


def _at(row: Quoted, notes: Sequence[NoteConf], texts: Sequence[str]) -> list[str]:
    """The footnotes of a cell, each once."""
    noted = [t for n, t in zip(notes, texts, strict=True) if n.where and row.matches(n.where)]
    return list(dict.fromkeys(noted))


def _in_reading_order(conf: TableConf, rows: Sequence[Quoted], at: Mapping[int, Sequence[str]]) -> list[str]:
    """Footnotes as the eye meets them, along the lines of each grid."""
    levels = [([conf.grids] if conf.grids else []), conf.rows, conf.columns]
    orders = [(fields, places(conf, rows, fields)) for fields in levels]
    read = sorted(rows, key=lambda r: [order[tuple(r.text(f) for f in fields)] for fields, order in orders])
    return list(dict.fromkeys(text for row in read for text in at[id(row)]))


def _text(note: NoteConf, footnotes: Mapping[str, str]) -> str:
    if (note.text is None) == (note.key is None):
        raise UserError("table.notes", note.text or note.key, "given by either text or key")
    if note.text is not None:
        return " ".join(note.text.split())
    assert note.key is not None
    if note.key not in footnotes:
        raise unknown_choice("table.notes.key", note.key, footnotes)
    return " ".join(footnotes[note.key].split())
