"""Accuracy records: written whole or not at all, read back one by one, so that a damaged one never hides the others.

``<results>/accuracy/<model>/<system>--<mode>/<task>--<key>--<run id>.json.gz``, and ``_mode--...`` for what a mode does
to the model's numbers.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flexgen_bench.core.accuracy import ACCURACY_SCHEMA_VERSION, ModeRecord, TaskRecord
from flexgen_bench.core.errors import StoreError
from flexgen_bench.store.reader import ACCURACY, Problem
from flexgen_bench.store.schema import decode_as, encode_as, parse_utc
from flexgen_bench.store.writer import safe_name, write_new

SUFFIX = ".json.gz"
_MODE = "_mode"
_ADVICE = "Delete it and run the task again."

AccuracyRecord = TaskRecord | ModeRecord
_Kind = TypeVar("_Kind", TaskRecord, ModeRecord)


@dataclass(frozen=True)
class StoredAccuracy:
    """All accuracy records of a results folder: the newest of each (subject, task), or of each subject."""

    tasks: Sequence[tuple[Path, TaskRecord]]
    modes: Sequence[tuple[Path, ModeRecord]]
    problems: Sequence[Problem]


def write_accuracy(record: AccuracyRecord, results_dir: Path) -> Path:
    """Save a record; returns its path. Raises StoreError if it cannot be saved or would not be readable."""
    what = record.task if isinstance(record, TaskRecord) else _MODE
    subject = record.subject
    folder = (
        Path(results_dir)
        / ACCURACY
        / safe_name(subject.model)
        / f"{safe_name(subject.system)}--{safe_name(subject.mode)}"
    )
    name = what if what == _MODE else safe_name(what)
    path = folder / f"{name}--{record.key[:8]}--{safe_name(record.run_id)}{SUFFIX}"
    write_new(path, to_bytes(record), "accuracy record")
    return path


def to_bytes(record: AccuracyRecord) -> bytes:
    """The exact bytes of a record's file; the same record gives the same bytes."""
    data = encode_as(record, "record")
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return gzip.compress(text.encode("utf-8", errors="backslashreplace"), mtime=0)


def read_task(path: Path) -> TaskRecord:
    """A task's record. Raises StoreError naming the file, what is wrong with it and what to do."""
    return _read(path, TaskRecord)


def read_mode(path: Path) -> ModeRecord:
    """A mode's record. Raises StoreError naming the file, what is wrong with it and what to do."""
    return _read(path, ModeRecord)


def read_accuracy(results_dir: Path, keys: Collection[str] | None = None) -> StoredAccuracy:
    """Every usable record; of one subject and task the one with most items, and of these the newest. An absent folder
    holds none.

    keys: only records of these. Raises StoreError if a folder cannot be listed.
    """
    tasks: list[tuple[Path, TaskRecord]] = []
    modes: list[tuple[Path, ModeRecord]] = []
    problems = []
    for path in accuracy_files(results_dir):
        if keys is not None and not any(f"--{key[:8]}--" in path.name for key in keys):
            continue
        try:
            if path.name.startswith(f"{_MODE}--"):
                modes.append((path, read_mode(path)))
            else:
                tasks.append((path, read_task(path)))
        except StoreError as error:
            problems.append(Problem(path, str(error)))
    return StoredAccuracy(
        _newest(tasks, lambda r: (_subject(r), r.task), lambda r: len(r.items)),
        _newest(modes, _subject, lambda r: 0),
        problems,
    )


def find_task(results_dir: Path, model: str, key: str, items: int) -> Path | None:
    """The newest readable record of this key with at least so many items; None if there is none. A damaged record is no
    record."""
    return _find(results_dir, model, key, read_task, lambda r: len(r.items) + len(r.left_out) >= items, mode=False)


def find_mode(results_dir: Path, model: str, key: str) -> Path | None:
    """The newest readable record of a mode's numbers; None if there is none."""
    return _find(results_dir, model, key, read_mode, lambda r: True, mode=True)


def accuracy_files(results_dir: Path) -> Iterator[Path]:
    """Files that should be accuracy records, sorted; hidden and temporary names are skipped."""
    root = Path(results_dir) / ACCURACY
    if not root.exists():
        return iter(())
    try:
        paths = sorted(root.glob(f"*/*/*{SUFFIX}"))
    except OSError as error:
        raise StoreError(f"cannot list the records in {root}: {error}") from error
    return (path for path in paths if not path.name.startswith("."))


def _find(
    results_dir: Path,
    model: str,
    key: str,
    read: Callable[[Path], _Kind],
    is_enough: Callable[[_Kind], bool],
    *,
    mode: bool,
) -> Path | None:
    best: tuple[str, Path] | None = None
    for path in accuracy_files(results_dir):
        if path.parent.parent.name != safe_name(model) or f"--{key[:8]}--" not in path.name:
            continue
        if path.name.startswith(f"{_MODE}--") is not mode:
            continue
        try:
            record = read(path)
        except StoreError:
            continue
        if record.key == key and is_enough(record) and (best is None or record.ended_utc > best[0]):
            best = (record.ended_utc, path)
    return None if best is None else best[1]


def _subject(record: AccuracyRecord) -> tuple[str, ...]:
    s = record.subject
    return s.model, s.fingerprint, s.run_dtype, s.system, s.mode


def _newest(
    records: Sequence[tuple[Path, _Kind]], identity: Callable[[_Kind], Any], size: Callable[[_Kind], int]
) -> list[tuple[Path, _Kind]]:
    best: dict[Any, tuple[Path, _Kind]] = {}
    for path, record in sorted(records, key=lambda f: (size(f[1]), f[1].ended_utc, f[1].run_id)):
        best[identity(record)] = (path, record)
    return sorted(best.values(), key=lambda f: f[0])


def _read(path: Path, kind: type[_Kind]) -> _Kind:
    try:
        data = json.loads(gzip.decompress(Path(path).read_bytes()))
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not a whole accuracy record ({error}). {_ADVICE}") from error
    if isinstance(data, dict) and data.get("schema_version") == 1:  # nothing could be left out then
        data |= {"schema_version": 2} | ({"left_out": {}} if kind is TaskRecord else {})
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != ACCURACY_SCHEMA_VERSION:
        raise StoreError(
            f"{path} has accuracy schema version {version!r}, this flexgen-bench knows {ACCURACY_SCHEMA_VERSION}. "
            "Update flexgen-bench to read it, or run the task again."
        )
    try:
        record: _Kind = decode_as(data, kind, "record")
        parse_utc(record.ended_utc, "record.ended_utc")
    except StoreError as error:
        raise StoreError(f"{path} is not a usable accuracy record: {error}. {_ADVICE}") from error
    return record
