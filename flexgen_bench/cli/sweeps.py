"""What the runs of a ``--multirun`` have left that a Hydra launcher put into other processes, perhaps on other hosts.

Hydra hands back nothing from there. So such a process leaves its outcome as a file beside the working folder, which
launchers share between hosts, and who asked gathers these files when all runs have ended.
"""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any


def _here() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def _frozen(values: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    """(The type cannot be pickled by its name either.)"""
    return MappingProxyType(values)


class _Pickler(pickle.Pickler):
    """Frozen mappings, of which plans and profiles have some, are sent as what they show."""

    def reducer_override(self, value: Any) -> Any:
        return (_frozen, (dict(value),)) if isinstance(value, MappingProxyType) else NotImplemented


@dataclass(frozen=True)
class Elsewhere:
    """Made by the process that asks, and sent with the work. asker: its host and process id."""

    folder: Path = field(default_factory=lambda: Path.cwd() / f".flexgen-bench-sweep-{uuid.uuid4().hex[:12]}")
    asker: tuple[str, int] = field(default_factory=_here)

    @property
    def is_away(self) -> bool:
        """Whether this is another process than the one that asks."""
        return _here() != self.asker

    def hand_in(self, outcome: Any) -> None:
        """Leave ``outcome`` for the asker; whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        temporary = self.folder / f".{name}"
        with temporary.open("wb") as file:
            _Pickler(file).dump(outcome)
        temporary.rename(self.folder / name)

    def gather(self) -> Iterator[Any]:
        """Everything handed in, oldest first; the folder is gone afterwards."""
        if not self.folder.is_dir():
            return
        files = [path for path in self.folder.iterdir() if not path.name.startswith(".")]
        for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
            yield pickle.loads(path.read_bytes())
        shutil.rmtree(self.folder)
