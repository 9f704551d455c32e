"""Both sides measured again in turns, so that what the machine does meanwhile falls on both."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexgen_bench.compare.pairs import Matched, Pair
from flexgen_bench.compare.sides import Side
from flexgen_bench.core.errors import UserError
from flexgen_bench.store.reader import StoredRecord, read_paths

_PROGRAM = ("python", "-m", "flexgen_bench")


@dataclass(frozen=True)
class Task:
    """One command on each side: the words after ``python -m flexgen_bench``."""

    a: tuple[str, ...]
    b: tuple[str, ...]


def tasks_of(matched: Matched, overrides: Sequence[str]) -> list[Task]:
    """What to rerun: the overrides on both sides, or, without any, the command in the newest record of each pair.

    Raises UserError where there is nothing to run.
    """
    if overrides:
        return [Task(tuple(overrides), tuple(overrides))]
    tasks = [Task(_words(pair.a[-1]), _words(pair.b[-1])) for pair in matched.pairs]
    if not tasks:
        raise UserError("--rerun", "no cell", "cells that both sides have", "Or name them: --rerun 3 -- suite=tiny")
    return list(dict.fromkeys(tasks))


def rerun(
    tasks: Sequence[Task], sides: tuple[Side, Side], rounds: int, out: Path, tell: Callable[[str], None]
) -> tuple[list[Path], list[Path]]:
    """Run every task ``rounds`` times on each side, AB then BA; the records' paths of A and of B, in order of time.

    Each run is a process of its own with the code of its side; its records are written below ``out`` and stay there.
    Raises UserError if a process ends without a record.
    """
    records: tuple[list[Path], list[Path]] = ([], [])
    for number in range(rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for task in tasks:
            for which in order:
                name = "AB"[which]
                words = (task.a, task.b)[which]
                tell(f"round {number + 1} of {rounds}, {name}: {shlex.join(words)}")
                records[which].extend(_run(words, sides[which], out / name / f"round-{number + 1}"))
    return records


def pairs_of_rounds(a: Sequence[StoredRecord], b: Sequence[StoredRecord], match: Callable[..., Matched]) -> Matched:
    """``match`` with only those rounds of a cell that both sides have, so that the n-th of A belongs to the n-th of
    B."""
    matched = match(a, b)
    pairs = []
    for pair in matched.pairs:
        rounds = min(len(pair.a), len(pair.b))
        pairs.append(Pair(pair.title, pair.a[:rounds], pair.b[:rounds], pair.differences))
    return Matched(tuple(pairs), matched.only_a, matched.only_b)


def _words(stored: StoredRecord) -> tuple[str, ...]:
    words = tuple(shlex.split(stored.record.rerun_command))
    if words[:3] != _PROGRAM:
        raise UserError(
            "--rerun", stored.record.rerun_command, f"a record whose command begins with {' '.join(_PROGRAM)}"
        )
    return words[3:]


def _run(words: Sequence[str], side: Side, results: Path) -> list[Path]:
    changed = {"rerun", "results_dir", "json"}
    kept = [word for word in words if word.split("=")[0] not in changed]
    own = ["rerun=true", f"results_dir={results.absolute()}", "json=true"]
    environment = dict(os.environ)
    if side.code is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(side.code), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "flexgen_bench", *kept, *own],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=side.code,
        check=False,
    )
    try:
        document = json.loads(done.stdout.strip().splitlines()[-1])
        paths = [Path(path) for path in document["records"]]
    except (IndexError, KeyError, TypeError, ValueError, RecursionError):
        paths = []
    if not paths:
        raise UserError(
            "--rerun", shlex.join(words), f"a command that measures; {side.name} left no record (see above)"
        )
    return paths


def read_back(paths: Sequence[Path]) -> list[StoredRecord]:
    """The records of a rerun. Raises UserError for one that cannot be read (another schema of another commit)."""
    records, problems = read_paths(paths)
    if problems:
        raise UserError("--rerun", str(problems[0].path), f"a record this version can read ({problems[0].message})")
    return records
