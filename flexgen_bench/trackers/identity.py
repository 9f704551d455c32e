"""Ids of runs: the same for the same thing sent again, another for every new measurement and every results folder."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from flexgen_bench.core.status import Status
from flexgen_bench.store.own_records import is_own
from flexgen_bench.store.reader import read_paths, record_files
from flexgen_bench.store.writer import suite_folder

# A random word in the results folder, not committed: two machines that measure the same cell are two runs.
ORIGIN = ".tracker-origin"
_DIGITS = 16


def origin_of(results_dir: Path) -> str:
    """The word of a results folder; made where there is none. OSError if it cannot be kept."""
    path = Path(results_dir) / ORIGIN
    if path.is_file() and (word := path.read_text(encoding="utf-8").strip()):
        return word
    path.parent.mkdir(parents=True, exist_ok=True)
    word = secrets.token_hex(8)
    path.write_text(word + "\n", encoding="utf-8")
    return word


def tracked_id(results_dir: Path, *parts: object) -> str:
    """An id of letters and digits from what a run is of."""
    text = "\n".join([origin_of(results_dir), *map(str, parts)])
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def measured_before(results_dir: Path, suite: str, spec_hash: str, besides: str = "") -> int:
    """How often this cell has been measured here, without the run ``besides``. Which measurement a run is, is part of
    its id: one that is killed has left no record, so the next one takes its place, and a rerun has an own. A cell that
    could not run was not measured."""
    paths = [
        path
        for path in record_files(Path(results_dir))
        if path.parent.name == suite_folder(suite) and f"--{spec_hash}--" in path.name
    ]
    stored, _ = read_paths(paths)
    own = (s.record for s in stored if s.record.run_id != besides and s.record.status is not Status.UNAVAILABLE)
    return sum(is_own(results_dir, record.run_id) for record in own)
