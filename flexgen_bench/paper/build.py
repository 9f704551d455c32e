"""All tables of the paper written into a folder: ``<name>.md``, ``.csv``, ``.tex`` and plots for each, and
``index.md``."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from flexgen_bench.config.paths import list_models
from flexgen_bench.config.table import configured_systems, footnotes, list_tables, paper_dir, table_conf
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.paper.cells import Sources
from flexgen_bench.paper.curves import plot
from flexgen_bench.paper.details import HEADERS, details
from flexgen_bench.paper.latex import latex
from flexgen_bench.paper.markdown import index, page
from flexgen_bench.paper.recorded import usable
from flexgen_bench.paper.scores import Scores
from flexgen_bench.paper.simulate import Simulations
from flexgen_bench.paper.svg import svg
from flexgen_bench.paper.table import PaperTable, build_table
from flexgen_bench.planner.ask import Ask
from flexgen_bench.published.quoted import read_papers
from flexgen_bench.store.accuracy_store import read_accuracy
from flexgen_bench.store.kept_predictions import FILE, Answer, load, text_of
from flexgen_bench.store.reader import Problem, StoredRecord

Write = Callable[[Path, str], Path]


def build_paper(
    records: Sequence[StoredRecord],
    problems: Sequence[Problem],
    results_dir: Path,
    out: Path,
    write: Write,
    *,
    simulate: bool = True,
    names: Sequence[str] | None = None,
    own: Path | None = None,
    workers: int = 1,
    also: Callable[[Iterable[tuple[str, str]]], Iterable[Ask]] | None = None,
) -> tuple[list[Path], list[UserError]]:
    """Write the tables ``names`` (None: all there are, with an index); returns the paths and what is wrong with other
    tables.

    problems: records that could not be read, for the index. own: a folder with table/*.yaml of the user's. workers:
    processes that predict; what they say is kept in ``results_dir``/predictions.json; if that cannot be used it is said
    on standard error, and all is asked anew. also: with all tables, what is to be answered and kept besides, given the
    (machine, model) of the tables. Raises UserError for an unknown name, and for what is wrong with the printed values
    themselves.
    """
    recorded, unfit = usable(records)
    simulations = None
    if simulate:
        simulations = Simulations(configured_systems(), list_models(), _known(results_dir / FILE))
    scores = Scores(read_accuracy(results_dir).tasks, results_dir)
    sources = Sources(simulations, recorded, results_dir, scores)
    chosen = list_tables(own) if names is None else list(dict.fromkeys(names))
    for name in chosen:
        if name not in list_tables(own):
            table_conf(name, own)
    tables, errors = _tables(chosen, own, sources)
    requested = also(simulations.pairs) if simulations and also and names is None else ()
    for one in requested:
        assert simulations is not None
        simulations.note(one)
    if simulations is not None and simulations.open:
        print(f"{simulations.open} predictions to make", file=sys.stderr)
        keep = partial(_keep, simulations.known, results_dir, write)
        try:
            simulations.answer_all(workers, keep)
        finally:
            keep()
        tables, errors = _tables(chosen, own, sources)
        for one in requested:
            simulations.note(one)
    if simulations is not None and names is None and not errors:
        _keep(simulations.used, results_dir, write)
    written: list[Path] = []
    plots: dict[str, list[str]] = {}
    for table, drawn in tables:
        plots[table.name] = sorted(drawn)
        written += _written(table, drawn, out, write)
    if names is None:
        relative = [_relative(p, results_dir) for p in [*problems, *unfit]]
        written.append(write(out / "index.md", index([t for t, _ in tables], relative, plots)))
    return written, errors


def known_tables(
    records: Sequence[StoredRecord], results_dir: Path, shipped: Path, names: Sequence[str] | None = None
) -> tuple[list[PaperTable], list[UserError]]:
    """The tables ``names`` (None: all) with what is known without asking anybody: printed values, records, and
    predictions that are kept in ``results_dir`` or ``shipped`` (others stand as pending). And what is wrong with other
    tables. Raises UserError for an unknown name."""
    recorded, _ = usable(records)
    kept = {**_known(shipped), **_known(results_dir / FILE)}
    simulations = Simulations(configured_systems(), list_models(), kept)
    scores = Scores(read_accuracy(results_dir).tasks, results_dir)
    chosen = list_tables(None) if names is None else list(dict.fromkeys(names))
    for name in chosen:
        if name not in list_tables(None):
            table_conf(name, None)
    tables, errors = _tables(chosen, None, Sources(simulations, recorded, results_dir, scores))
    return [table for table, _ in tables], errors


def _tables(
    names: Sequence[str], own: Path | None, sources: Sources
) -> tuple[list[tuple[PaperTable, dict[str, str]]], list[UserError]]:
    """The tables with their plots by file name, and what is wrong with others."""
    quoted, texts = read_papers(paper_dir()), footnotes()
    tables, errors = [], []
    for name in names:
        try:
            table = build_table(name, table_conf(name, own), quoted, texts, sources)
            drawn = {f"{f.name}.svg": svg(plot(table, f)) for f in table.conf.figures}
        except UserError as error:
            field = error.field if f"{name}.yaml" in error.field else f"{name}.yaml: {error.field}"
            errors.append(UserError(field, error.value, error.allowed, error.action))
        else:
            tables.append((table, drawn))
    return tables, errors


def _known(path: Path) -> dict[str, Answer]:
    """The answers kept in a file. It is only a cache: one that is damaged costs time, no table."""
    try:
        return load(path)
    except StoreError as error:
        print(f"warning: {error}; they are made anew, and replace it", file=sys.stderr)
        return {}


def _keep(answers: Mapping[str, Answer], results_dir: Path, write: Write) -> None:
    """Into the file of predictions, if it does not say so already."""
    path, text = results_dir / FILE, text_of(answers)
    if answers and (not path.is_file() or path.read_bytes() != text.encode()):
        write(path, text)


def _written(table: PaperTable, drawn: dict[str, str], out: Path, write: Write) -> list[Path]:
    name = table.name
    return [
        write(out / f"{name}.md", page(table, sorted(drawn))),
        write(out / f"{name}.csv", _csv(table)),
        write(out / f"{name}.tex", latex(table)),
        *(write(out / file, text) for file, text in sorted(drawn.items())),
    ]


def _csv(table: PaperTable) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(HEADERS)
    lines.writerows(details(table))
    return text.getvalue()


def _relative(problem: Problem, results_dir: Path) -> Problem:
    """A page must not depend on the path by which its records were found."""
    name = os.path.relpath(problem.path, results_dir)
    return replace(problem, message=problem.message.replace(str(problem.path), name))
