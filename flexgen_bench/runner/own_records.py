"""Which records of a results folder were measured in this checkout.

Records travel with the repository; a cell that somebody else measured is not finished on this machine. The
list is a file that is not committed.
"""

from __future__ import annotations

from pathlib import Path

LIST = ".measured-here"


def note_own(results_dir: Path, run_id: str) -> None:
    """Remember a run before its record is written: a name without a record does no harm."""
    results_dir.mkdir(parents=True, exist_ok=True)
    with (results_dir / LIST).open("a") as file:
        file.write(run_id + "\n")


def is_own(results_dir: Path, run_id: str) -> bool:
    """Whether the record of this run was made here."""
    path = results_dir / LIST
    return path.is_file() and run_id in path.read_text().split()
