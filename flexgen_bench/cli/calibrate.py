"""``python -m flexgen_bench calibrate``: measure this machine and keep its rates."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from flexgen_bench.calibrate.effort import FULL, QUICK, Effort
from flexgen_bench.calibrate.stable import RoundProgress
from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.folders import make_writable, path_argument
from flexgen_bench.core.units import format_seconds
from flexgen_bench.machine import host as machine
from flexgen_bench.machine.measured_rates import path_for, save
from flexgen_bench.machine.profile import write_profile

# Lines of a log, and redraws of a terminal's line.
_LOG_S, _REDRAW_S = 5.0, 0.2
_LOG_WIDTH = 130  # the widest table, where there is no terminal to ask


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flexgen-bench calibrate",
        description="Measure what this machine sustains, with the engine's own code, and keep it for predictions.",
    )
    parser.add_argument("--quick", action="store_true", help="about 20 seconds instead of minutes")
    parser.add_argument("--threads", type=int, help="that compute (default: one per physical core)")
    parser.add_argument("--cache-dir", type=path_argument, help="default: $FLEXGEN_BENCH_CACHE, ~/.cache/flexgen-bench")
    parser.add_argument("--disk-dir", type=path_argument, help="where offloaded files will be (default: the cache)")
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="FILE.yaml",
        help="write a machine for conf/gpu instead of keeping the rates in the cache",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after one line on standard error that says what is wrong."""
    options = _parser().parse_args(arguments)
    effort = QUICK if options.quick else FULL
    try:
        return _run(options, effort)
    except (UserError, StoreError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, effort: Effort) -> int:
    threads = machine.physical_cores() if options.threads is None else options.threads
    if not 1 <= threads <= machine.logical_cores():
        raise UserError("--threads", threads, f"from 1 to the {machine.logical_cores()} hardware threads here")
    cache = default_cache_dir() if options.cache_dir is None else options.cache_dir
    if options.out is None:
        make_writable(cache, "--cache-dir")
    elif options.out.suffix not in (".yaml", ".yml"):
        raise UserError("--out", str(options.out), "a file name that ends in .yaml")
    else:
        make_writable(options.out.absolute().parent, "--out")
    disk_dir = cache if options.disk_dir is None else options.disk_dir
    # Only now: these load torch, and what is wrong above is told at once.
    from rich.console import Console

    from flexgen_bench.calibrate.disk import check_folder
    from flexgen_bench.calibrate.run import calibrate
    from flexgen_bench.calibrate.table import print_tables

    check_folder(disk_dir, effort)
    with ProgressLine(effort.patience.budget_s) as line:
        calibration, readings = calibrate(effort, threads, disk_dir, line.show)
    print_tables(readings, Console(width=None if sys.stdout.isatty() else _LOG_WIDTH))
    for note in calibration.notes:
        print(f"note: {note}", file=sys.stderr)
    if calibration.unstable:
        print(_warning(calibration.unstable, effort), file=sys.stderr)
    if options.out is None:
        path = path_for(cache, threads)
        save(calibration, path)
    else:
        path = options.out
        write_profile(calibration, path, disk_dir)
    print(f"written: {path}")
    return 0


def _warning(unstable: Sequence[str], effort: Effort) -> str:
    few = ", ".join(unstable[:8]) + (f" and {len(unstable) - 8} more" if len(unstable) > 8 else "")
    return (
        f"warning: {len(unstable)} constants still vary by more than {effort.patience.spread:.0%} (marked *): {few}. "
        "Something else may be running; measure again on a quiet machine."
    )


class ProgressLine:
    """One line on standard error: redrawn on a terminal, repeated now and then in a log."""

    def __init__(self, budget_s: float) -> None:
        self._budget_s, self._shown_s = budget_s, -_LOG_S
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def show(self, progress: RoundProgress) -> None:
        now = time.monotonic()
        if now - self._shown_s < (_REDRAW_S if self._terminal else _LOG_S):
            return
        self._shown_s = now
        what = f"round {progress.round}" if progress.round else "warming up"
        text = (
            f"calibrating: {what}, {progress.finished} of {progress.total} constants stable, "
            f"{format_seconds(progress.elapsed_s)} of at most about {format_seconds(self._budget_s)}"
        )
        start, end = ("\r\033[K", "") if self._terminal else ("", "\n")
        print(start + text, end=end, file=sys.stderr, flush=True)
