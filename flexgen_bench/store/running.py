"""What a suite is doing, as a small file beside its records: for whoever watches from another process.

``<results>/.running-<process id>.json``, replaced whole at each change. It is no record and says no figure; the newest
of a process stays until the next suite begins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.errors import StoreError, UserError

WAITING, RUNNING = "waiting", "running"
FINISHED, STOPPED = "finished", "stopped"
_PATTERN = ".running-*.json"


@dataclass(frozen=True)
class RunningCell:
    """One cell of a suite.

    state: WAITING, RUNNING, or how it ended. run: its record's, once there is one; skipped: it was measured before.
    expected_s, took_s: None where nobody knows.
    """

    state: str = WAITING
    label: str = ""
    expected_s: float | None = None
    took_s: float | None = None
    run: str = ""
    reason: str = ""
    skipped: bool = False


@dataclass(frozen=True)
class RunningSuite:
    """A suite and its cells, in order. state: RUNNING, FINISHED, or STOPPED, whose process is gone. stage, meter: what
    the running cell does and how far it is, in words. left_s: seconds until the end, None where nobody knows."""

    process: int
    suite: str
    started: str
    cells: Sequence[RunningCell]
    state: str = RUNNING
    stage: str = ""
    meter: str = ""
    left_s: float | None = None


def write_running(suite: RunningSuite, results_dir: Path) -> None:
    """Replace what the process has said before. Raises OSError."""
    path = results_dir / f".running-{suite.process}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(to_json(suite)), encoding="utf-8")
    temporary.replace(path)


def read_running(results_dir: Path) -> list[RunningSuite]:
    """What every process has said last, the newest suite first. A file that is half there or of another version is
    left out: whoever watches looks again."""
    found = []
    for path in results_dir.glob(_PATTERN):
        try:
            suite = from_json(RunningSuite, json.loads(path.read_text(encoding="utf-8")), "suite", complete=True)
        except (OSError, ValueError, UserError, StoreError, RecursionError):
            continue
        gone = suite.state == RUNNING and not _is_running(suite.process)
        found.append(_stopped(suite) if gone else suite)
    return sorted(found, key=lambda suite: suite.started, reverse=True)


def forget_ended(results_dir: Path) -> None:
    """Remove what suites have left that run no more."""
    for path in results_dir.glob(_PATTERN):
        number = path.stem.rpartition("-")[2]
        if not (number.isdecimal() and int(number) != os.getpid() and _is_running(int(number))):
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    """Whether there is a process of this id on this machine, whoever's it is."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _stopped(suite: RunningSuite) -> RunningSuite:
    cells = [replace(cell, state=WAITING) if cell.state == RUNNING else cell for cell in suite.cells]
    return replace(suite, cells=cells, state=STOPPED, stage="", meter="", left_s=None)
