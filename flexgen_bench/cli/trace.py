"""``python -m flexgen_bench trace RUN``: what every lane did in a recorded run, as files to look at and as figures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.folders import make_writable, path_argument
from flexgen_bench.store.whole_file import write_text
from flexgen_bench.trace.chart import chart
from flexgen_bench.trace.chrome import trace_events
from flexgen_bench.trace.runs import TracedRun, find_run
from flexgen_bench.trace.summary import summarise, to_text


def write_files(run: TracedRun, out: Path) -> list[Path]:
    """``<record>.trace.json`` for ui.perfetto.dev and ``<record>.svg``; files of an earlier call are replaced.

    Raises UserError if ``out`` is no folder that can be written to, StoreError if there is no room.
    """
    make_writable(out, "--out")
    name = run.path.stem
    events = json.dumps(trace_events(run), separators=(",", ":"), allow_nan=False)
    return [write_text(out / f"{name}.trace.json", events + "\n"), write_text(out / f"{name}.svg", chart(run))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after one line on standard error that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="flexgen-bench trace",
        description="Show what every lane did in a recorded run: a trace for ui.perfetto.dev, a picture, and figures.",
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a record's file, its name, the beginning of its hash or of its run's name, or 'latest'",
    )
    parser.add_argument("--out", type=path_argument, default=Path("traces"), help="folder for the files")
    parser.add_argument("--results", type=path_argument, default=Path("results"), help="folder of records")
    options = parser.parse_args(arguments)
    try:
        run = find_run(options.run, options.results)
        written = write_files(run, options.out)
    except (UserError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{run.title}\nrun {run.record.run_id}, last measured repetition\n")
    print(to_text(summarise(run.timeline)))
    for path in written:
        print(path)
    return 0
