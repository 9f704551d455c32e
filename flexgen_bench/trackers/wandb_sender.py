"""The process that talks to wandb: ``python -m flexgen_bench.trackers.wandb_sender``, started by ``sender.py``.

The first line on standard input holds the options, every other one an order: begin, log or end. It takes a
low priority, so that it runs where the measurement leaves room.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

# What history is plotted against: the time of the cell, but for what is of a repetition or of a task.
TIME = "time_s"
STEPS = {"repetition": ("sample/*", "metric/*"), "task_number": ("task_score",)}


def main() -> int:
    """Carry out orders until there are no more."""
    answers = _answers()
    os.nice(10)
    lines = sys.stdin
    head = json.loads(lines.readline())
    try:
        import wandb
    except ImportError as error:
        _answer(answers, f"wandb cannot be imported ({error}); pip install wandb")
        return 1
    sending = Sending(wandb, head["options"], Path(head["directory"]))
    for line in lines:
        order = json.loads(line)
        try:
            if order["do"] == "log":
                sending.log(order["row"])
                continue
            problem = sending.begin(order["run"]) if order["do"] == "begin" else sending.end(order["result"])
        except Exception as error:  # whatever wandb raises: it is reported, and the record is safe
            if order["do"] == "log":
                sending.failed = sending.failed or one_line(error)
                continue
            problem = one_line(error)
        _answer(answers, problem)
    return 0


class Sending:
    """One run at a time. failed: what logging has failed with, told at the end."""

    def __init__(self, wandb: Any, options: Mapping[str, Any], directory: Path) -> None:
        self._wandb, self._options, self._directory = wandb, options, directory
        self._run: Any = None
        self.failed = ""

    def begin(self, run: Mapping[str, Any]) -> str:
        """Returns why the run goes to files instead of the server, "" if it is where it should be."""
        self.failed = ""
        self._run, trouble = self._start(run)
        self._run.define_metric(TIME)
        self._run.define_metric("*", step_metric=TIME)
        for step, names in STEPS.items():
            self._run.define_metric(step)
            for name in names:
                self._run.define_metric(name, step_metric=step)
        self._log_tables(run["tables"])
        return f"online: {trouble}; written offline instead" if trouble else ""

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log(row)

    def end(self, result: Mapping[str, Any]) -> str:
        try:
            self._send(self._run, result)
        finally:  # what came before a failure is kept, too
            self._run.finish(exit_code=0 if result["ok"] else 1)
            self._run = None
        return self.failed

    def _send(self, run: Any, result: Mapping[str, Any]) -> None:
        run.config.update(result["config"], allow_val_change=True)
        run.tags = (*(run.tags or ()), *result["tags"])
        for row in result["rows"]:
            run.log(row)
        self._log_tables(result["tables"])
        for name, svg in result["pictures"].items():
            run.log({name: self._wandb.Html(svg, inject=False)})
        if result["files"]:
            run.log_artifact(self._artifact(result["files"], run.id))
        run.summary.update(result["summary"])

    def _log_tables(self, tables: Mapping[str, Any]) -> None:
        for name, table in tables.items():
            # Columns of ids are text in one run and numbers in another.
            made = self._wandb.Table(columns=table["columns"], data=table["rows"], allow_mixed_types=True)
            self._run.log({name: made})

    def _artifact(self, files: list[Mapping[str, Any]], run_id: str) -> Any:
        """The run's record and trace. Copied where it is sent from: offline, that may be after the records are gone."""
        artifact = self._wandb.Artifact(f"cell-{run_id}", type="record")
        for file in files:
            if file["path"]:
                artifact.add_file(file["path"], name=file["name"])
            else:
                with artifact.new_file(file["name"], mode="w", encoding="utf-8") as new:
                    new.write(file["text"])
        return artifact

    def _start(self, run: Mapping[str, Any]) -> tuple[Any, str]:
        """A started run. Online falls back to files: what cannot be sent now can be synced later."""
        mode = os.environ.get("WANDB_MODE", "")
        mode = mode if mode in ("offline", "disabled") else self._options["mode"]
        arguments = {
            "id": run["id"],
            "project": self._options["project"],
            "entity": self._options["entity"] or None,
            "name": run["name"],
            "group": run["group"],
            "job_type": run["kind"],
            "config": run["config"],
            "tags": run["tags"],
            # A part of the time only: the rest is for writing, and for offline where online fails.
            "settings": self._wandb.Settings(
                init_timeout=max(1.0, self._options["timeout_s"] / 4), x_disable_stats=True, disable_git=True
            ),
        }
        self._forget(run["id"])
        try:
            return self._wandb.init(mode=mode, **arguments), ""
        except Exception as error:
            if mode == "offline":
                raise
            return self._wandb.init(mode="offline", **arguments), one_line(error)

    def _forget(self, run_id: str) -> None:
        """Files of an offline run of this id: what is sent now takes its place (of a killed run, of an older table)."""
        for folder in self._directory.glob(f"wandb/offline-run-*-{run_id}"):
            shutil.rmtree(folder, ignore_errors=True)


def one_line(error: Exception) -> str:
    """What an error says, as a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _answers() -> TextIO:
    """Standard output for answers alone: what libraries print goes to standard error."""
    pipe = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(pipe, "w", encoding="utf-8")


def _answer(answers: TextIO, problem: str) -> None:
    answers.write(json.dumps({"problem": problem}) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
