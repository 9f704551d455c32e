"""Which records of a results folder were measured in this checkout.

Records travel with the repository; a cell that somebody else measured is not finished on this machine. The
list is a file that is not committed.
"""

from __future__ import annotations

from pathlib import Path

from flexgen_bench.core.errors import StoreError

LIST = ".measured-here"


def note_own(results_dir: Path, run_id: str) -> None:
    """Remember a run whose record is written. StoreError if that fails: the cell would be measured again."""
    try:
        with (results_dir / LIST).open("a") as file:
            file.write(run_id + "\n")
    except OSError as error:
        raise StoreError(
            f"the record of {run_id} is saved, but {results_dir / LIST} cannot be written: {error.strerror}"
        ) from error


def is_own(results_dir: Path, run_id: str) -> bool:
    """Whether the record of this run was made here."""
    path = results_dir / LIST
    return path.is_file() and run_id in path.read_text().split()
