"""A package that is kept beside this project's environment, in a folder of its own in the cache, because what it brings
or asks for would change the environment."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flexgen_bench.core.errors import CannotRun

_stage = logging.getLogger("flexgen_bench.stage")


@dataclass(frozen=True)
class Beside:
    """name: of the package and of its module. probe: a file that is there once it is. small: modules it imports that
    this project does not bring by itself, and the packages they come in."""

    name: str
    version: str
    probe: str
    small: Mapping[str, str] = field(default_factory=dict)

    def folder(self, cache: Path) -> Path:
        """Where ``install`` puts it."""
        return cache / "python" / f"{self.name}-{self.version}"

    def is_installed(self, cache: Path) -> bool:
        """Whether it can be used: in its folder, or because somebody has installed this very version here."""
        return self.is_here or (self.folder(cache) / self.probe).is_file()

    @property
    def is_here(self) -> bool:
        """Whether this environment has it, in this version."""
        try:
            return importlib.metadata.version(self.name) == self.version
        except importlib.metadata.PackageNotFoundError:
            return False

    def install(self, cache: Path) -> None:
        """Install it with pip, and of what it depends on only what is not here at all: torch and transformers stay as
        they are.

        pip's own settings are followed: PIP_NO_INDEX=1 with PIP_FIND_LINKS=FOLDER needs no network. Raises CannotRun.
        """
        requirement = f"{self.name}=={self.version}"
        missing = [name for module, name in self.small.items() if importlib.util.find_spec(module) is None]
        _stage.info("installing %s into a folder of its own", requirement)
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-deps",
            "--quiet",
            "--disable-pip-version-check",
            "--upgrade",
            "--target",
            str(self.folder(cache)),
            requirement,
            *missing,
        ]
        pip = subprocess.run(command, capture_output=True, text=True, check=False)
        if pip.returncode != 0 or not self.is_installed(cache):
            lines = [line for line in pip.stderr.splitlines() if line.strip()] or ["no reason given"]
            others = f" (and those of {', '.join(self.small.values())})" if self.small else ""
            raise CannotRun(
                f"cannot install {requirement} ({lines[-1].strip()}). Connect to the package index, or put its "
                f"wheel{others} into a folder and set PIP_NO_INDEX=1 PIP_FIND_LINKS=<folder>."
            )
