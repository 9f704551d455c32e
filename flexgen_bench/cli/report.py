"""``python -m flexgen_bench report``: rebuild the tables and pages from the records, and the FlexGen paper's own
tables."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from flexgen_bench.accuracy.compare.compare import Margins
from flexgen_bench.cells.shipped_jobs import ladder_rows, shipped_asks
from flexgen_bench.config.paths import default_cache_dir, shipped_predictions
from flexgen_bench.core.errors import StoreError, UserError, unknown_choice
from flexgen_bench.core.folders import path_argument
from flexgen_bench.core.processes import cores
from flexgen_bench.paper.build import build_paper
from flexgen_bench.pictures.build import FOLDER as PICTURES_FOLDER
from flexgen_bench.pictures.build import build_pictures
from flexgen_bench.pictures.draw import CannotDraw
from flexgen_bench.pictures.gather import material
from flexgen_bench.report.accuracy.build import FOLDER as ACCURACY_FOLDER
from flexgen_bench.report.accuracy.build import build_accuracy
from flexgen_bench.report.accuracy.links import accuracy_lines
from flexgen_bench.report.ladder.predicted import predicted_page
from flexgen_bench.report.page import index_page, suite_page
from flexgen_bench.report.rows import Row, build_rows
from flexgen_bench.report.table import to_csv, to_markdown
from flexgen_bench.report.usable import what_is_odd
from flexgen_bench.store.kept_predictions import FILE
from flexgen_bench.store.reader import Problem, read_all
from flexgen_bench.store.whole_file import write_text
from flexgen_bench.store.writer import suite_folder

PREDICTED_LADDERS = "predicted/ladder.md"
_MARKER = re.compile(r"<!-- (/?)table(?::([^\s>]*))? -->")


def build_reports(results_dir: Path, out: Path, margins: Margins | None = None, predicted: str = "") -> list[Path]:
    """Write ``<suite>.md`` and ``<suite>.csv`` for every suite, ``index.md``, the pages of accuracy and all
    pictures (none where matplotlib is not installed, which standard error says); returns the paths. predicted: a page
    of predicted ladders that the index is to name; "" for none.

    Raises UserError if ``results_dir`` is no folder or a suite is called index, StoreError if it cannot be listed.
    """
    suites, problems = _load(results_dir)
    if "index" in suites:  # its page would replace the index of all pages
        raise UserError("suite", "index", "another name", "Rename its folder and its records' suite.")
    written, accuracy = build_accuracy(results_dir, out / ACCURACY_FOLDER, write_text, margins)
    for suite, rows in suites.items():
        mine = [p for p in problems if p.path.parent.name == suite]
        linked = accuracy_lines(rows, accuracy, ACCURACY_FOLDER)
        page = suite_page(suite, rows, mine, results_dir, linked)
        written.append(write_text(out / f"{suite}.md", page))
        written.append(write_text(out / f"{suite}.csv", to_csv(rows, results_dir)))
    records = [row.stored for rows in suites.values() for row in rows]
    try:
        everything = material(records, accuracy, problems, results_dir)
        drawn = build_pictures(everything, results_dir, out / PICTURES_FOLDER, write_text)
    except CannotDraw as error:
        drawn = []
        print(f"no pictures: {error}", file=sys.stderr)
    accuracy_page = f"{ACCURACY_FOLDER}/index.md" if accuracy else ""
    pictures_page = f"{PICTURES_FOLDER}/index.md" if drawn else ""
    index = index_page(dict(suites), problems, results_dir, accuracy_page, pictures_page, predicted)
    written += drawn
    written.append(write_text(out / "index.md", index))
    return written


def build_paper_tables(
    results_dir: Path,
    out: Path,
    *,
    simulate: bool = True,
    names: Sequence[str] | None = None,
    own: Path | None = None,
    workers: int = 1,
) -> tuple[list[Path], list[UserError]]:
    """Write the FlexGen paper's tables (see ``report.paper.build``) into ``out``/paper; returns the paths and what went
    wrong."""
    if own is not None and not own.is_dir():
        raise UserError("--config-dir", str(own), "a folder with table/<name>.yaml")
    records, problems = read_all(results_dir, what_is_odd)
    return build_paper(
        records,
        problems,
        results_dir,
        out / "paper",
        write_text,
        simulate=simulate,
        names=names,
        own=own,
        workers=workers,
        also=shipped_asks if _ships(results_dir) else None,
    )


def build_predicted_ladders(out: Path, cache: Path) -> Path:
    """Write the ladders of machines that are not here, from what is kept of their predictions (what is not is asked,
    and kept in ``cache``); returns the path. Raises UserError for what is wrong with the suite."""
    return write_text(out / PREDICTED_LADDERS, predicted_page(ladder_rows(cache)))


def update_readme(results_dir: Path, readme: Path) -> list[str]:
    """Put each suite's table between its ``<!-- table:SUITE -->`` and ``<!-- /table -->``; returns the suites.

    Raises UserError for a missing file, a file without markers, a marker that is not closed or an unknown suite.
    """
    suites, _ = _load(results_dir)
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError("--readme", str(readme), f"a readable file ({error.strerror})") from error
    pieces, names, kept_until = [], [], 0
    for start, name, end in _marked_spans(text, readme):
        if name not in suites:
            raise unknown_choice(f"marker table:{name} in {readme}", name, suites)
        pieces += [text[kept_until:start], "\n", to_markdown(suites[name]).rstrip() + "\n"]
        names.append(name)
        kept_until = end
    write_text(readme, "".join(pieces) + text[kept_until:])
    return names


def _ships(results_dir: Path) -> bool:
    """Whether its file of predictions is the one that is shipped: only that holds more than the paper's tables ask."""
    return (results_dir / FILE).resolve() == shipped_predictions().resolve()


def _load(results_dir: Path) -> tuple[dict[str, list[Row]], list[Problem]]:
    if not results_dir.is_dir():
        raise UserError(
            "results_dir",
            str(results_dir),
            "an existing folder of records",
            "Measure something first: python -m flexgen_bench",
        )
    records, problems = read_all(results_dir, what_is_odd)
    names = sorted({suite_folder(s.record.suite) for s in records})
    suites = {name: build_rows([s for s in records if suite_folder(s.record.suite) == name]) for name in names}
    return suites, problems


def _marked_spans(text: str, readme: Path) -> list[tuple[int, str, int]]:
    """Where the tables go: (end of the opening marker, suite, start of the closing marker)."""
    spans: list[tuple[int, str, int]] = []
    opened: re.Match[str] | None = None
    for marker in _MARKER.finditer(text):
        closes, name = marker.group(1) == "/", marker.group(2)
        if closes != (opened is not None) or closes == bool(name):
            raise UserError(str(readme), marker.group(0), "tables marked in pairs", "Write each as " + _PAIR)
        if closes and opened is not None:
            spans.append((opened.end(), opened.group(2), marker.start()))
            opened = None
        else:
            opened = marker
    if opened is not None or not spans:
        unpaired = opened.group(0) if opened is not None else "no markers"
        raise UserError(str(readme), unpaired, "tables marked in pairs", "Write each as " + _PAIR)
    return spans


_PAIR = "<!-- table:SUITE --> and <!-- /table -->, each on its own line."


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after a line on standard error for each thing that is wrong."""
    options = _parser().parse_args(arguments)
    wrong: Sequence[Exception] = ()
    try:
        margins = Margins(options.margin_score, options.margin_bits)
        predicts = options.tables is None and not options.no_simulation and _ships(options.results_dir)
        written = build_reports(options.results_dir, options.out, margins, PREDICTED_LADDERS if predicts else "")
        filled = update_readme(options.results_dir, options.readme) if options.readme else []
        if options.tables != ["none"]:
            paper, wrong = build_paper_tables(
                options.results_dir,
                options.out,
                simulate=not options.no_simulation,
                names=options.tables,
                own=options.config_dir,
                workers=options.workers or cores(),
            )
            written += paper
        if predicts:
            written.append(build_predicted_ladders(options.out, default_cache_dir()))
    except (UserError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    if filled:
        print(f"{options.readme}: {', '.join(filled)}")
    for problem in wrong:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flexgen-bench report",
        description="Rebuild tables and pages from records, and the FlexGen paper's tables from what it prints, beside "
        "simulations. The same "
        "records and configuration give the same bytes. In a checkout it also keeps, in results/predictions.json, the "
        "answers that "
        "python -m flexgen_bench model=X gpu=Y gives at once.",
    )
    parser.add_argument("results_dir", nargs="?", type=path_argument, default=Path("results"))
    parser.add_argument("out", nargs="?", type=path_argument, default=Path("reports"))
    parser.add_argument(
        "--readme", type=path_argument, help="also fill the tables between <!-- table:SUITE --> markers"
    )
    usual = Margins()
    parser.add_argument(
        "--margin-score",
        type=float,
        default=usual.score,
        help="accuracy pages: a loss of score up to this counts as none (default: %(default)s, two points)",
    )
    parser.add_argument(
        "--margin-bits",
        type=float,
        default=usual.bits,
        help="accuracy pages: the same in added bits per byte (default: %(default)s)",
    )
    parser.add_argument(
        "--tables",
        type=lambda text: [name.strip() for name in text.split(",")],
        help="of the paper's tables only these, e.g. t2,t4 (default: every conf/table/*.yaml; none: none)",
    )
    parser.add_argument("--no-simulation", action="store_true", help="the paper's tables without simulated values")
    parser.add_argument("--config-dir", type=path_argument, help="a folder of your own with table/<name>.yaml")
    parser.add_argument("--workers", type=int, help="processes that predict (default: a core each)")
    return parser
