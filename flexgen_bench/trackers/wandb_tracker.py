"""Sends runs to Weights & Biases while they happen, from a process of its own (``sender.py``)."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.trackers.base import TrackedResult, TrackedRun, Value
from flexgen_bench.trackers.sender import Sender

_MODULE = "flexgen_bench.trackers.wandb_sender"
# Beside the runs: what the process has printed.
LOG = "sender.log"
# Runs that fail one after the other before nothing more is tried.
_PATIENCE = 2


class Mode(StrEnum):
    """Where runs go. WANDB_MODE=offline or disabled in the environment overrules it."""

    OFFLINE = "offline"  # to files under the tracker's folder; `wandb sync` sends them later
    ONLINE = "online"  # to the server this user is logged in to; to files if that fails


@dataclass(frozen=True)
class WandbOptions:
    """Settings of the tracker. ``timeout_s``: longest time that beginning or ending a run may take."""

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
    """The tracker; see ``base.Tracker``. A failure loses the run it happens in, and the next one is tried anew;
    after ``_PATIENCE`` in a row the rest is not sent."""

    def __init__(self, options: WandbOptions, directory: Path) -> None:
        self._options = options
        self._directory = Path(directory).absolute()
        self._sender: Sender | None = None
        self._run: str | None = None  # the name of the one that has begun and is being sent
        self._dropped = self._failures = 0
        self._told: set[str] = set()

    def begin(self, run: TrackedRun) -> None:
        if self._failures >= _PATIENCE:
            return
        self._run, self._dropped = run.name, 0
        self._ask({"do": "begin", "run": to_json(run)})

    def log(self, row: Mapping[str, Value]) -> None:
        if self._run is not None and self._sender is not None:
            self._dropped += not self._sender.tell({"do": "log", "row": row})

    def end(self, result: TrackedResult) -> None:
        if self._run is None:
            return
        name, dropped = self._run, self._dropped
        if self._ask({"do": "end", "result": to_json(result)}) and dropped:
            self._say(f"{dropped} rows of the history of {name} were dropped: it was behind")
        self._run = None

    def close(self) -> None:
        if self._sender is not None:
            self._sender.end()
        self._sender = self._run = None

    def _ask(self, order: dict[str, Any]) -> bool:
        """Whether the order was carried out."""
        try:
            self._sender = self._sender or self._started()
            problem = self._sender.ask(order, self._options.timeout_s)
        except OSError as error:
            problem = str(error)
        if not problem or problem.startswith("online:"):  # it went to files instead
            self._failures = 0
            if problem:
                self._say(problem)
            return True
        self._failures += 1
        rest = " and of what follows" if self._failures >= _PATIENCE else ""
        self._say(f"{problem}: what was not sent of {self._run}{rest} is lost there", problem + rest)
        self.close()
        return False

    def _started(self) -> Sender:
        self._directory.mkdir(parents=True, exist_ok=True)
        sender = Sender(_MODULE, wandb_environment(self._directory), self._directory / LOG)
        sender.tell({"options": to_json(self._options), "directory": str(self._directory)})
        return sender

    def _say(self, text: str, problem: str = "") -> None:
        """Each problem once."""
        if (problem or text) in self._told:
            return
        self._told.add(problem or text)
        print(f"tracker wandb: {text}. The records are safe on disk; the run goes on.", file=sys.stderr)


def wandb_environment(directory: Path) -> dict[str, str]:
    """Variables that keep every file wandb writes under ``directory``, out of the home folder, and ours as they are."""
    places = {
        "WANDB_DIR": "",
        "WANDB_CACHE_DIR": "cache",
        "WANDB_DATA_DIR": "data",
        "WANDB_CONFIG_DIR": "config",
        "WANDB_ARTIFACT_DIR": "artifacts",
    }
    quiet = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_ERROR_REPORTING": "false"}
    found = {name: os.environ[name] for name in ("WANDB_CONFIG_DIR",) if name in os.environ}  # where a login may lie
    return {name: str(directory / folder) for name, folder in places.items()} | quiet | found
