"""A table of the paper, and the index of all, as Markdown pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flexgen_bench.paper.details import HEADERS, details, reasons
from flexgen_bench.paper.grid import Entry, Grid, grids
from flexgen_bench.paper.table import PaperTable
from flexgen_bench.report.table import escape
from flexgen_bench.store.reader import Problem

_BUILT = "Built by `python -m flexgen_bench.report` from conf/table, conf/paper and the records; edit nothing here."
LEGEND = (
    "QUOTED = printed by the paper; in brackets how far to trust our copy of it: exact (read in an original), copy (a "
    "third party's "
    "transcription), digitised (off a plot), derived (computed from other printed values), reconstructed (put "
    "together from the authors' "
    "repository).",
    "simulated = the same system with the printed policy, by this project's model of it. this engine = this project's "
    "engine with the policy that "
    "its own search finds; what is named behind it is compressed: what the search chose of what it may (where there "
    "is no number: what it may). SIMULATED = nothing was run; MEASURED, EMULATED and PROJECTED come from a record of "
    "the same job on the same machine.",
    "(0.98x) = the value divided by the printed one.",
)
# What a reader of the page does not need beside the grid; the CSV has everything.
_IN_THE_CSV_ALONE = {"table", "unrounded", "simulated_source", "simulated_settings", "ours_source", "ours_settings"}
_OF_A_JOB = ("model", "prompt_len", "gen_len", "gpus", "metric", "unit", "policy")


def page(table: PaperTable, figures: Sequence[str]) -> str:
    """The page of one table; ``figures`` are the names of its plots beside it."""
    name = table.name
    lines = [f"# {escape(table.conf.title)}", "", _BUILT, ""]
    for grid in grids(table):
        lines += [*([f"**{escape(grid.title)}**", ""] if grid.title else []), *_grid(grid), ""]
    lines += [f"{number}. {escape(note)}" for number, note in enumerate(table.notes, 1)]
    lines += [""] if table.notes else []
    lines += [f"- {escape(remark)}" for remark in table.remarks]
    lines += [""] if table.remarks else []
    for figure in figures:
        lines += [f"![{escape(figure)}]({figure})", ""]
    why = reasons(table)
    if why:
        lines += ["## Why there is no number", "", *(f"- {escape(w)}" for w in why), ""]
    lines += ["## Every value", "", f"With settings and sources in full: [{name}.csv]({name}.csv).", ""]
    lines += _details(table)
    lines += ["", " ".join(LEGEND)]
    return "\n".join(lines) + "\n"


def index(tables: Sequence[PaperTable], problems: Sequence[Problem], figures: dict[str, list[str]]) -> str:
    """All tables with their files. problems: records that are of no use here, their paths seen from the results
    folder."""
    lines = ["# Tables of the papers", "", _BUILT, ""]
    lines += ["| Table | Printed values | Simulated | Run here | Files |", "|---|---|---|---|---|"]
    for table in tables:
        published = sum(bool(c.published.value) for c in table.cells)
        kinds = [b.evidence.value for c in table.cells for b in (c.simulated, c.ours) if b.evidence]
        simulated = kinds.count("SIMULATED")
        files = [f"[{e}]({table.name}.{e})" for e in ("csv", "tex")]
        files += [f"[{name}]({name})" for name in figures[table.name]]
        title = f"[{escape(table.conf.title)}]({table.name}.md)"
        cells = (title, str(published), str(simulated), str(len(kinds) - simulated), ", ".join(files))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", " ".join(LEGEND), ""]
    if problems:
        lines += ["## Records that could not be used", ""]
        lines += [f"- {escape(p.message)}" for p in problems]
    return "\n".join(lines).rstrip() + "\n"


def _grid(grid: Grid) -> list[str]:
    columns = [escape(", ".join(filter(None, names))) for names in grid.columns]
    header = [*(escape(_name(n)) for n in grid.row_names), "", "evidence", *columns]
    lines = [_line(header), _line("---" for _ in header)]
    for line in grid.lines:
        shown = [f"**{escape(name)}**" if name else "" for name in line.names]
        entries = [" / ".join(_entry(e) for e in place) or "-" for place in line.entries]
        lines.append(_line([*shown, escape(line.what), escape(line.evidence), *entries]))
    return lines


def _entry(entry: Entry) -> str:
    marks = f" \\[{','.join(map(str, entry.notes))}\\]" if entry.notes else ""
    return escape(entry.text) + marks


def _details(table: PaperTable) -> list[str]:
    """Columns that are empty in every row are left out, and what every row has is said once."""
    rows = details(table)
    values = {h: {row[i] for row in rows} for i, h in enumerate(HEADERS)}
    shown = [h for h in HEADERS if h not in _IN_THE_CSV_ALONE and not values[h] <= {"", "-"}]
    same = [h for h in shown if h in _OF_A_JOB and len(values[h]) == 1 and len(rows) > 1]
    columns = [HEADERS.index(h) for h in shown if h not in same]
    shared = [f"{_name(h)} {next(iter(values[h]))}" for h in same]
    lines = [escape(f"In every row: {'; '.join(shared)}."), ""] if shared else []
    lines += [_line(_name(HEADERS[i]) for i in columns), _line("---" for _ in columns)]
    return lines + [_line(escape(row[i]) for i in columns) for row in rows]


def _name(header: str) -> str:
    return header.replace("_", " ")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
