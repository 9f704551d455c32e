r"""A table of the paper as LaTeX: one ``tabular`` per grid in the manner of the ``booktabs`` package, to be \input into
a document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from flexgen_bench.paper.grid import Entry, Grid, Key, grids
from flexgen_bench.paper.table import PaperTable

_SIGNS = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "[": "{[}",
    "]": "{]}",
    "×": r"$\times$",
    "±": r"$\pm$",
}


# A table that is wider than the page is shrunk to it.
_NO_WIDER = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
_LONGEST_NUMBER = 24


def escape(text: str) -> str:
    """``text`` without anything that LaTeX would take for a command; line breaks become spaces."""
    return "".join(_SIGNS.get(sign, sign) for sign in " ".join(text.split()))


def latex(table: PaperTable) -> str:
    """The whole table: a ``table`` environment with caption, grids and footnotes."""
    lines = [
        "% Built by python -m flexgen_bench.report; edit nothing here.",
        r"% Needs \usepackage{array,booktabs,graphicx} and \usepackage[T1]{fontenc}.",
        r"\begin{table}[t]",
        r"\centering\small",
        rf"\caption{{{escape(table.conf.title)}}}",
        rf"\label{{tab:flexgen-{escape_label(table.name)}}}",
    ]
    for grid in grids(table):
        lines += [rf"\par\medskip\textbf{{{escape(grid.title)}}}\par\smallskip"] if grid.title else []
        lines += _tabular(grid)
    lines += _notes(table.notes, table.remarks)
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def escape_label(name: str) -> str:
    """A label may hold letters, digits and dashes."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name)


def _tabular(grid: Grid) -> list[str]:
    leading = len(grid.row_names) + 2
    lines = [_NO_WIDER, rf"\begin{{tabular}}{{@{{}}{'l' * leading}{_columns(grid)}@{{}}}}", r"\toprule"]
    lines += _headers(grid.columns, grid.row_names, leading)
    lines.append(r"\midrule")
    for index, line in enumerate(grid.lines):
        if index and any(line.names):
            lines.append(r"\addlinespace")
        entries = [" / ".join(_entry(e) for e in place) or "-" for place in line.entries]
        lines.append(_row([*map(escape, (*line.names, line.what, line.evidence)), *entries]))
    return [*lines, r"\bottomrule", r"\end{tabular}}"]


def _columns(grid: Grid) -> str:
    """Numbers to the right; text of any length in paragraphs."""
    longest = max(len(e.text) for line in grid.lines for place in line.entries for e in place)
    if longest <= _LONGEST_NUMBER:
        return "r" * len(grid.columns)
    return r">{\raggedright\arraybackslash}p{4.5cm}" * len(grid.columns)


def _headers(columns: Sequence[Key], row_names: Key, leading: int) -> list[str]:
    """One header line per level; equal names side by side are one, ruled below."""
    levels = list(zip(*columns, strict=True))
    lines = []
    for depth, level in enumerate(levels):
        innermost = depth == len(levels) - 1
        first = [*(n.replace("_", " ") for n in row_names), "", "evidence"]
        cells = [*map(escape, first)] if innermost else [""] * leading
        rules, at = [], leading + 1
        for name, group in groupby(level):
            width = len(list(group))
            if innermost:
                cells += [escape(name)] * width
            else:
                cells.append(rf"\multicolumn{{{width}}}{{c}}{{{escape(name)}}}")
                rules.append(rf"\cmidrule(lr){{{at}-{at + width - 1}}}")
            at += width
        lines.append(_row(cells))
        lines += ["".join(rules)] if rules else []
    return lines


def _notes(notes: Sequence[str], remarks: Sequence[str]) -> list[str]:
    if not notes and not remarks:
        return []
    texts = [rf"\textsuperscript{{{n}}}~{escape(t)}" for n, t in enumerate(notes, 1)]
    texts += [escape(remark) for remark in remarks]
    return [r"\par\medskip\begin{minipage}{\linewidth}\footnotesize", *(f"{t}\\par" for t in texts), r"\end{minipage}"]


def _entry(entry: Entry) -> str:
    marks = ",".join(map(str, entry.notes))
    return escape(entry.text) + (rf"\textsuperscript{{{marks}}}" if marks else "")


def _row(cells: Iterable[str]) -> str:
    return f"{' & '.join(cells)} \\\\"
