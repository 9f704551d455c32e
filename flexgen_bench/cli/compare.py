"""``python -m flexgen_bench compare A B``: which cells became better or worse, with intervals; measured again in turns
where that is asked for."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from flexgen_bench.cli.ending import FAILED, status_of
from flexgen_bench.compare.pairs import Matched, match
from flexgen_bench.compare.rerun import pairs_of_rounds, read_back, rerun, tasks_of
from flexgen_bench.compare.sides import Side, read_side
from flexgen_bench.compare.verdict import MARGIN, Judged, Verdict, judge
from flexgen_bench.compare.words import to_json, to_text
from flexgen_bench.core.errors import StoreError, UserError, unknown_choice
from flexgen_bench.core.folders import make_writable, path_argument
from flexgen_bench.core.metrics import DEFINITIONS, HEADLINE
from flexgen_bench.store.reader import StoredRecord


def main(arguments: Sequence[str]) -> int:
    """0: nothing is worse; 1: a cell is worse (or, with --fail-on undecided, not decided), or a record of B cannot be
    used, or B has lost a cell in a rerun; 2: bad input."""
    words = list(arguments)
    cut = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:cut])
    interrupted = "interrupted; records that were measured stay"
    return status_of(lambda: _compare(options, words[cut + 1 :]), (StoreError,), interrupted)


def _compare(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    _check(options, overrides)
    with ExitStack() as stack:
        code = bool(options.rerun)
        a, b = (stack.enter_context(read_side(n, t, needs_code=code)) for n, t in (("A", options.a), ("B", options.b)))
        matched = match(_of_suite(a, options.suite), _of_suite(b, options.suite))
        if options.rerun:
            a, b, matched = _measured_again(a, b, matched, options, overrides)
        judged = [judge(pair, options.metric, options.margin, rounds=bool(options.rerun)) for pair in matched.pairs]
        if options.json:
            print(json.dumps(to_json((a, b), matched, judged, options.margin), allow_nan=False))
        else:
            print(to_text(a, b, matched, judged, options.margin))
    if not judged:
        raise UserError("A and B", f"{options.a}, {options.b}", "sides with a cell in common")
    lost = bool(b.problems) or bool(options.rerun and matched.only_a)  # what A has and B does not is no success
    return FAILED if lost else _status(judged, options.fail_on)


def _measured_again(
    a: Side, b: Side, matched: Matched, options: argparse.Namespace, overrides: Sequence[str]
) -> tuple[Side, Side, Matched]:
    out = options.out / datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    make_writable(out, "--out")
    paths = rerun(tasks_of(matched, overrides), (a, b), options.rerun, out, lambda text: print(text, file=sys.stderr))
    records = [read_back(side) for side in paths]
    print(f"records: {out}", file=sys.stderr)
    a, b = (replace(side, records=tuple(new), problems=()) for side, new in zip((a, b), records, strict=True))
    return a, b, pairs_of_rounds(a.records, b.records, match)


def _check(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    if options.metric not in DEFINITIONS:
        raise unknown_choice("--metric", options.metric, DEFINITIONS)
    if not 0 <= options.margin < 1:
        raise UserError("--margin", options.margin, "a share from 0 to below 1, 0.03 for three percent")
    if options.rerun is not None and options.rerun < 2:
        raise UserError("--rerun", options.rerun, "at least 2 rounds: one has no spread")
    if overrides and not options.rerun:
        raise UserError("--", " ".join(overrides), "left out without --rerun", "It names the cells to measure again.")


def _of_suite(side: Side, suite: str | None) -> list[StoredRecord]:
    return [stored for stored in side.records if suite is None or stored.record.suite == suite]


def _status(judged: Sequence[Judged], fail_on: str) -> int:
    bad = {Verdict.WORSE, Verdict.UNDECIDED} if fail_on == "undecided" else {Verdict.WORSE}
    return FAILED if any(cell.verdict in bad for cell in judged) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flexgen-bench compare",
        description="Say for each cell that A and B both have whether B is better, worse, the same within a margin, or "
        "whether that is undecided. Exit status: 0 if nothing is worse, 1 if something is, 2 for bad input.",
    )
    what = "a folder of records, one record, a checkout, or a commit of the repository in the current folder"
    parser.add_argument("a", metavar="A", help=what)
    parser.add_argument("b", metavar="B", help="the same; B is judged beside A")
    parser.add_argument(
        "--metric", default=HEADLINE, help="one of " + ", ".join(DEFINITIONS) + " (default: %(default)s)"
    )
    parser.add_argument("--suite", help="only cells of this suite")
    parser.add_argument(
        "--margin", type=float, default=MARGIN, help="a change up to this share counts as none (default: %(default)s)"
    )
    parser.add_argument(
        "--fail-on",
        choices=("worse", "undecided"),
        default="worse",
        help="what makes the exit status 1 (default: worse)",
    )
    parser.add_argument(
        "--rerun",
        type=int,
        metavar="ROUNDS",
        help="measure both again in turns, with the code of each if it is a commit or a checkout: the commands of the "
        "cells in common, or what is written after --, e.g. --rerun 5 -- suite=tiny system=flexgen",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        default=Path("compared"),
        help="folder for the records of --rerun (default: compared)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    return parser
