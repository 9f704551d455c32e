"""What ``A`` and ``B`` of a comparison can be: a folder of records, one record, a checkout, or a commit."""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from flexgen_bench.core.errors import UserError
from flexgen_bench.report.usable import what_is_odd
from flexgen_bench.store.reader import Problem, StoredRecord, read_paths, record_files

RESULTS = "results"


@dataclass(frozen=True)
class Side:
    """One of the two. code: the folder whose program reruns its cells; None: the program that runs now."""

    name: str
    records: tuple[StoredRecord, ...]
    problems: tuple[Problem, ...]
    code: Path | None = None


@contextmanager
def read_side(field: str, text: str, *, needs_code: bool = False) -> Iterator[Side]:
    """The side that ``text`` names; a commit's files exist as long as this is open.

    A name that is a path is taken as one; anything else is asked of git. needs_code: a commit's whole tree is laid out,
    to run it. Raises UserError naming ``field`` for what is neither, or what holds no records and no code.
    """
    path = Path(text).expanduser()
    if path.is_file():
        records, problems = read_paths([path], what_is_odd)
        if problems:
            raise UserError(field, text, f"a usable record ({problems[0].message})")
        yield Side(text, tuple(records), ())
    elif path.is_dir():
        yield _of_folder(field, text, path)
    else:
        commit = _commit(field, text)
        with tempfile.TemporaryDirectory(prefix="flexgen-bench-compare-") as folder:
            _lay_out(commit, Path(folder), "." if needs_code else RESULTS)
            if needs_code and not (Path(folder) / "flexgen_bench" / "__init__.py").is_file():
                allowed = "a commit that holds flexgen_bench/, to run it"
                raise UserError(field, text, allowed, "Leave out --rerun to compare its records.")
            records, problems = read_paths(record_files(Path(folder) / RESULTS), what_is_odd)
            yield Side(f"{text} ({commit[:10]})", tuple(records), tuple(problems), Path(folder) if needs_code else None)


def _of_folder(field: str, text: str, path: Path) -> Side:
    is_checkout = (path / "flexgen_bench" / "__init__.py").is_file()
    where = path / RESULTS if is_checkout else path
    own = [f for f in sorted(where.glob("*.json")) if not f.name.startswith(".") and "--" in f.name]
    records, problems = read_paths([*own, *record_files(where)], what_is_odd)
    if not (records or problems or is_checkout):
        raise UserError(field, text, "a folder with records, a record, a checkout or a commit")
    return Side(text, tuple(records), tuple(problems), path.absolute() if is_checkout else None)


def _commit(field: str, text: str) -> str:
    command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{text}^{{commit}}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(field, text, "a folder or a record (there is no git here to ask for a commit)") from error
    if answer.returncode != 0:
        raise UserError(
            field, text, "a folder with records, a record, or a commit of the repository in the current folder"
        )
    return answer.stdout.strip()


def _lay_out(commit: str, folder: Path, what: str) -> None:
    """The commit's files below ``what`` (none, if it has no such folder), without touching the working tree."""
    listed = subprocess.run(["git", "rev-parse", "--show-toplevel"], capture_output=True, text=True, check=True)
    command = ["git", "-C", listed.stdout.strip(), "archive", "--format=tar", commit]
    archive = subprocess.run([*command, *([] if what == "." else [what])], capture_output=True, check=False)
    if archive.returncode != 0:
        return
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
