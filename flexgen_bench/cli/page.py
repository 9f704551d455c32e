"""``python -m flexgen_bench page``: every record in one folder that a browser opens from disk; with --live, while a
suite runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flexgen_bench.cli.ending import status_of
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.folders import path_argument

DEFAULT_PORT = 8765


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if something cannot be written or listed, 2 for bad input."""
    options = _parser().parse_args(arguments)
    return status_of(lambda: _run(options), (StoreError,), interrupted="")


def _run(options: argparse.Namespace) -> int:
    from flexgen_bench.page.build import PageBuilder
    from flexgen_bench.page.gather import Gatherer

    if options.port is not None and not options.live:
        raise UserError("--port", options.port, "left out without --live", "A page on disk has no server.")
    port = DEFAULT_PORT if options.port is None else options.port
    if not 0 <= port < 65536:
        raise UserError("--port", port, "0 (any that is free) to 65535")
    gatherer = Gatherer(list(dict.fromkeys(options.results_dir)) or [Path("results")])
    builder = PageBuilder(gatherer, options.out, _tell, tables=() if options.tables == ["none"] else options.tables)
    page = builder.build()
    if not options.live:
        print(page)
        return 0
    from flexgen_bench.page.live import serve

    serve(builder, port, lambda text: print(text, flush=True))
    return 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flexgen-bench page",
        description="Write a page of all records into a folder: open its index.html in a browser. It needs no server, "
        "no account and no network.",
    )
    parser.add_argument(
        "results_dir", nargs="*", type=path_argument, help="folders of records (default: results), each with its suites"
    )
    parser.add_argument("--out", type=path_argument, default=Path("page"), help="folder to write (default: page)")
    parser.add_argument(
        "--tables",
        type=lambda text: [name.strip() for name in text.split(",")],
        help="of the papers' tables only these, e.g. t2,t4 (default: all; none: none)",
    )
    parser.add_argument(
        "--live", action="store_true", help="serve the page to this machine alone, and show what a running suite does"
    )
    parser.add_argument(
        "--port", type=int, help=f"of --live, on 127.0.0.1 (default: {DEFAULT_PORT}; 0: any that is free)"
    )
    return parser
