"""Reading records back. One damaged record is reported and never hides the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.machine_name import machine_of
from flexgen_bench.core.record import Record
from flexgen_bench.store.schema import bounded, decode, parse, parse_utc
from flexgen_bench.store.writer import suite_folder

# Figures of the scripts in benchmarks/, and records of accuracy, lie beside the suites.
BENCHMARKS, ACCURACY = "benchmarks", "accuracy"


@dataclass(frozen=True)
class StoredRecord:
    """A record and the file it came from."""

    path: Path
    record: Record

    @property
    def age(self) -> tuple[datetime, str]:
        """Sorts older before newer; the run id decides between equal times."""
        return parse_utc(self.record.ended_utc, "record.ended_utc"), self.record.run_id


@dataclass(frozen=True)
class Problem:
    """A file that should be a record and cannot be used, and why."""

    path: Path
    message: str


Odd = Callable[[StoredRecord], str]


def read_record(path: Path) -> Record:
    """The record in a file. Raises StoreError naming the file, what is wrong with it and what to do."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"cannot read record {path}: {error}") from error
    try:
        return decode(bounded(parse(text)))
    except (ValueError, OverflowError, RecursionError) as error:  # also a number of more digits than Python reads
        raise StoreError(
            f"{path} is not a whole JSON document ({error}). Delete it and measure the cell again."
        ) from error
    except StoreError as error:
        raise StoreError(f"{path} is not a usable record: {error}") from error


def read_paths(paths: Iterable[Path], odd: Odd | None = None) -> tuple[list[StoredRecord], list[Problem]]:
    """Every record that can be read, in the order given, and what is wrong with the others. odd: says of a record that
    can be read why it cannot be used all the same."""
    records, problems = [], []
    for path in map(Path, paths):
        try:
            stored = StoredRecord(path, read_record(path))
        except StoreError as error:
            problems.append(Problem(path, str(error)))
            continue
        said = odd(stored) if odd is not None else ""
        if said:
            problems.append(Problem(path, f"{path} {said}"))
        else:
            records.append(stored)
    return records, problems


def read_all(results_dir: Path, odd: Odd | None = None) -> tuple[list[StoredRecord], list[Problem]]:
    """The newest record of every spec in every suite on every kind of machine, and the files that could not be used.

    Suites are kept apart: the same cell may stand in two of them, and each has its own table. So are machines: records
    of several are collected by copying their folders into one. An absent folder holds no records. odd: see
    ``read_paths``; none that is odd stands in an older one's place. Raises StoreError if ``results_dir``
    cannot be listed.
    """
    records, problems = read_paths(record_files(Path(results_dir)), odd)
    newest: dict[tuple[str, str, str], StoredRecord] = {}
    for stored in sorted(records, key=lambda s: s.age):
        machine = machine_of(stored.record.environment)
        newest[suite_folder(stored.record.suite), stored.record.spec_hash, machine] = stored
    return sorted(newest.values(), key=lambda s: s.path), problems


def find_record(results_dir: Path, spec_hash: str, suite: str | None = None) -> Path | None:
    """The newest valid record of a spec, in ``suite`` if one is named; None if there is none.

    A record that is damaged or half-written is no record: the cell counts as not measured.
    """
    files = [
        path
        for path in record_files(Path(results_dir))
        if f"--{spec_hash}--" in path.name and (suite is None or path.parent.name == suite_folder(suite))
    ]
    records, _ = read_paths(files)
    matching = [s for s in records if s.record.spec_hash == spec_hash]
    return max(matching, key=lambda s: s.age).path if matching else None


def record_files(results_dir: Path) -> Iterator[Path]:
    """The record files, sorted; hidden and temporary names are skipped. StoreError if they cannot be listed."""
    if not results_dir.exists():
        return iter(())
    try:
        folders = sorted(p for p in results_dir.iterdir() if p.is_dir() and p.name not in (BENCHMARKS, ACCURACY))
        files = [f for d in folders for f in sorted(d.iterdir())]
    except OSError as error:
        raise StoreError(f"cannot list the records in {results_dir}: {error}") from error
    return (f for f in files if f.suffix == ".json" and not f.name.startswith("."))
