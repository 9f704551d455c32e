"""Sends finished records to Weights & Biases, from a process of its own.

The other process is what makes the promise of ``Tracker`` hold: a missing package, a crash, a server that
never answers or an exit hook that waits for one end with it, after ``timeout_s`` at the latest.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.record import Record
from flexgen_bench.store.writer import suite_folder


class Mode(StrEnum):
    """Where runs go."""

    OFFLINE = "offline"  # to files under the tracker's folder; `wandb sync` sends them later
    ONLINE = "online"  # to the server this user is logged in to; to files if that fails


@dataclass(frozen=True)
class WandbOptions:
    """Settings of the tracker. ``timeout_s``: longest time one record may take to send."""

    mode: Mode = Mode.OFFLINE
    project: str = "flexgen-bench"
    entity: str = ""
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.mode not in list(Mode):
            raise unknown_choice("tracker.mode", str(self.mode), list(Mode))
        object.__setattr__(self, "mode", Mode(self.mode))
        if not self.project:
            raise UserError("tracker.project", self.project, "a name")
        if isinstance(self.timeout_s, bool) or not self.timeout_s > 0:
            raise UserError("tracker.timeout_s", self.timeout_s, "more than zero seconds")


class WandbTracker:
    """One run per record, sent as soon as it is finished, and a summary run per suite with the table."""

    def __init__(self, options: WandbOptions, directory: Path) -> None:
        self._options = options
        self._directory = Path(directory).absolute()
        self._suites: dict[str, list[Path]] = {}
        self._told: set[str] = set()

    def log_record(self, record: Record, path: Path) -> None:
        self._suites.setdefault(suite_folder(record.suite), []).append(Path(path).absolute())
        self._send("record", record.suite, [Path(path).absolute()])

    def finish(self) -> None:
        for suite, paths in self._suites.items():
            self._send("suite", suite, paths)
        self._suites = {}

    def _send(self, what: str, suite: str, paths: list[Path]) -> None:
        order = {
            "what": what,
            "suite": suite,
            "paths": [str(p) for p in paths],
            "options": to_json(self._options),
            "directory": str(self._directory),
        }
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            problem = self._run_sender(json.dumps(order))
        except OSError as error:
            problem = str(error)
        if problem and problem not in self._told:
            self._told.add(problem)
            print(f"tracker wandb: {problem}. The records are safe on disk; the run goes on.", file=sys.stderr)

    def _run_sender(self, order: str) -> str:
        """Run the sender to its end; returns what went wrong, empty if nothing did."""
        with subprocess.Popen(
            [sys.executable, "-m", "flexgen_bench.trackers.wandb_sender"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | wandb_environment(self._directory),
            # A session of its own, so that wandb's helper processes can be ended with it.
            start_new_session=True,
        ) as process:
            try:
                _, said = process.communicate(order.encode(), timeout=self._options.timeout_s)
            except subprocess.TimeoutExpired:
                return f"no end after {self._options.timeout_s:g} s"
            finally:  # also on Ctrl-C: nothing of it stays behind
                _end_session(process)
        lines = said.decode(errors="replace").strip().splitlines()
        if process.returncode == 0:
            return ""
        return lines[-1] if lines else f"ended with status {process.returncode}"


def wandb_environment(directory: Path) -> dict[str, str]:
    """Variables that keep every file wandb writes under ``directory``, out of the home folder."""
    places = {
        "WANDB_DIR": "",
        "WANDB_CACHE_DIR": "cache",
        "WANDB_DATA_DIR": "data",
        "WANDB_CONFIG_DIR": "config",
        "WANDB_ARTIFACT_DIR": "artifacts",
    }
    quiet = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_ERROR_REPORTING": "false"}
    return {name: str(directory / folder) for name, folder in places.items()} | quiet


def _end_session(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # everything in it has ended by itself
    finally:
        process.wait()
