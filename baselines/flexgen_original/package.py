"""Where the original's package is: importable, or in a folder of its own in the cache.

It brings a second top-level package named ``experimental``, so it does not belong into this project's environment.
"""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

from flexgen_bench.core.errors import CannotRun

NAME, VERSION = "flexgen", "0.1.8"
# Modules it imports that this project does not bring by itself, and the packages they come in.
SMALL = {"attr": "attrs", "tqdm": "tqdm"}
_stage = logging.getLogger("flexgen_bench.stage")


def folder(cache: Path) -> Path:
    """Where ``install`` puts it."""
    return cache / "python" / f"{NAME}-{VERSION}"


def is_installed(cache: Path) -> bool:
    """Whether it can be used: in its folder, or because somebody has installed it here."""
    if importlib.util.find_spec(NAME) is not None:
        return True
    return (folder(cache) / NAME / "flex_opt.py").is_file()


def install(cache: Path) -> None:
    """Install it with pip, and of what it depends on only what is not here at all: torch and transformers stay as they
    are.

    pip's own settings are followed: PIP_NO_INDEX=1 with PIP_FIND_LINKS=FOLDER needs no network. Raises CannotRun.
    """
    requirement = f"{NAME}=={VERSION}"
    missing = [name for module, name in SMALL.items() if importlib.util.find_spec(module) is None]
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
        str(folder(cache)),
        requirement,
        *missing,
    ]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode != 0 or not is_installed(cache):
        lines = [line for line in pip.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise CannotRun(
            f"cannot install {requirement} ({lines[-1].strip()}). Connect to the package index, or put its wheel (and "
            f"those of {', '.join(SMALL.values())}) into a "
            "folder and set PIP_NO_INDEX=1 PIP_FIND_LINKS=<folder>."
        )
