"""Reads offline runs of wandb back from their files, as a server would get them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexgen_bench.trackers.dashboard import Scope

_BLOCK, _HEAD = 32768, 7


@dataclass
class OfflineRun:
    """What one run has: history rows without what wandb adds; summary with the last value of each history field, as the
    server makes it; metrics: what fields are plotted against."""

    folder: Path
    id: str = ""
    name: str = ""
    group: str = ""
    kind: str = ""
    project: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)
    artifacts: list[list[str]] = field(default_factory=list)
    exit: int | None = None

    def having(self, name: str) -> list[dict[str, Any]]:
        """The rows of history that have a field."""
        return [row for row in self.history if name in row]

    def table(self, name: str) -> list[dict[str, Any]]:
        """The rows of a table that was logged."""
        (row,) = self.having(name)
        content = json.loads((self.folder / "files" / row[name]["path"]).read_text())
        return [dict(zip(content["columns"], values, strict=True)) for values in content["data"]]


def read_runs(directory: Path) -> list[OfflineRun]:
    """All runs below the tracker's folder, in the order in which they began."""
    return [read_run(folder) for folder in sorted(directory.glob("wandb/offline-run-*"))]


def read_run(folder: Path) -> OfflineRun:
    from wandb.proto.wandb_internal_pb2 import Record as Message

    run = OfflineRun(folder)
    (log,) = folder.glob("*.wandb")
    for payload in _payloads(log):
        message = Message()
        message.ParseFromString(payload)
        kind = message.WhichOneof("record_type")
        if kind == "run":
            run.id, run.name, run.group = message.run.run_id, message.run.display_name, message.run.run_group
            run.kind, run.project, run.tags = message.run.job_type, message.run.project, list(message.run.tags)
            run.config |= _items(message.run.config.update)
        elif kind == "config":
            run.config |= _items(message.config.update)
        elif kind == "history":
            row = {name: value for name, value in _items(message.history.item).items() if not name.startswith("_")}
            run.history.append(row)
            run.summary |= row
        elif kind == "summary":
            run.summary |= _items(message.summary.update)
        elif kind == "metric":
            run.steps[message.metric.name or message.metric.glob_name] = message.metric.step_metric
        elif kind == "exit":
            run.exit = message.exit.exit_code
        elif kind == "artifact":
            run.artifacts.append([entry.path for entry in message.artifact.manifest.contents])
        elif kind == "request" and message.request.WhichOneof("request_type") == "log_artifact":
            run.artifacts.append([e.path for e in message.request.log_artifact.artifact.manifest.contents])
    return run


def fields_of(runs: list[OfflineRun]) -> dict[str, dict[Scope, set[str]]]:
    """By kind of run, the names that a panel may query."""
    found: dict[str, dict[Scope, set[str]]] = {}
    for run in runs:
        of_kind = found.setdefault(run.kind, {scope: set() for scope in Scope})
        of_kind[Scope.HISTORY].update(name for row in run.history for name in row)
        of_kind[Scope.SUMMARY].update(run.summary)
        of_kind[Scope.CONFIG].update(run.config)
    return found


def _items(found: Any) -> dict[str, Any]:
    """Named values; those that were sent leaf by leaf (tables, pictures) are put together again."""
    values: dict[str, Any] = {}
    for item in found:
        *outer, last = item.nested_key or [item.key]
        inner = values
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = json.loads(item.value_json)
    return values


def _payloads(path: Path) -> Iterator[bytes]:
    """The messages of a LevelDB-style log: blocks of chunks, each (checksum, length, kind) and data."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, whole = _HEAD, b""
    while at + _HEAD <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEAD:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += _HEAD
        chunk, at = data[at : at + length], at + length
        whole = chunk if kind in (1, 2) else whole + chunk  # 1 whole, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            yield whole
