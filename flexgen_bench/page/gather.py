"""Everything that a page shows, read from results folders: records of every age, and files that are no records."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.machine_name import machine_of
from flexgen_bench.page.policy_words import policy_of
from flexgen_bench.report.rows import Row, build_rows
from flexgen_bench.report.usable import what_is_odd
from flexgen_bench.store.reader import StoredRecord, read_record, record_files
from flexgen_bench.store.writer import suite_folder


@dataclass(frozen=True)
class PageRow:
    """A record as a row of the page.

    folder: the results folder it lies in, as the user wrote it. newest: no later run of the same cell is in its suite.
    """

    row: Row
    folder: str
    newest: bool

    @property
    def file(self) -> str:
        """Its path as the user would write it."""
        return str(self.row.stored.path)


@dataclass(frozen=True)
class Broken:
    """A file that should be a record and cannot be used: what it was, and what is to be done."""

    file: str
    message: str


@dataclass
class Gatherer:
    """Reads results folders again and again, each file once as long as it does not change.

    folders: as the user wrote them. Raises UserError for one that is none.
    """

    folders: Sequence[Path]
    _read: dict[Path, tuple[tuple[int, int], StoredRecord | Broken]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for folder in self.folders:
            if not folder.is_dir():
                action = "Measure something first: python -m flexgen_bench"
                raise UserError("results_dir", str(folder), "an existing folder of records", action)

    def gather(self) -> tuple[list[PageRow], list[Broken]]:
        """All records, comparable ones together and the fastest of them first, and all files that are none.

        Raises StoreError if a folder cannot be listed.
        """
        stored: list[tuple[str, StoredRecord]] = []
        broken: list[Broken] = []
        for folder in self.folders:
            for path in record_files(folder):
                found = self._one(path)
                if isinstance(found, Broken):
                    broken.append(found)
                else:
                    stored.append((str(folder), found))
        of_path = {s.path: folder for folder, s in stored}
        newest = _newest(stored)
        rows = build_rows([s for _, s in stored])
        return [PageRow(r, of_path[r.stored.path], r.stored.path in newest) for r in rows], broken

    def _one(self, path: Path) -> StoredRecord | Broken:
        state = _state(path)
        kept = self._read.get(path)
        if kept is not None and kept[0] == state:
            return kept[1]
        found: StoredRecord | Broken
        try:
            found = StoredRecord(path, read_record(path))
            odd = what_is_odd(found, policy_of)
            found = Broken(str(path), odd) if odd else found
        except StoreError as error:
            found = Broken(str(path), str(error).removeprefix(f"{path} "))
        self._read[path] = (state, found)
        return found


def _newest(stored: Sequence[tuple[str, StoredRecord]]) -> set[Path]:
    """The last run of each cell of a suite on each kind of machine, in each folder."""
    last: dict[tuple[str, ...], StoredRecord] = {}
    for folder, one in stored:
        key = (folder, suite_folder(one.record.suite), one.record.spec_hash, machine_of(one.record.environment))
        if key not in last or one.age > last[key].age:
            last[key] = one
    return {one.path for one in last.values()}


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file does; zeros for one that is gone or cannot be looked at: reading it will say why."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size
