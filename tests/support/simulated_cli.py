"""The command line in a folder of its own, with systems that fake predictors stand for."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.command import run_command

Answer = subprocess.CompletedProcess[str]
Run = Callable[..., Answer]


def make_run(folder: Path) -> Run:
    """``run("model=opt-30b", "gpu=t4")``; records go to ./results, and the systems of ``add_system`` exist."""

    def run(*arguments: str, command: str = "run") -> Answer:
        root = str(Path(__file__).parents[2])
        (folder / "tmp").mkdir(exist_ok=True)
        (folder / "conf").mkdir(exist_ok=True)
        return run_command(
            folder,
            *(command, "--config-dir", "conf", *arguments),
            FLEXGEN_BENCH_CACHE=str(folder / "cache"),
            PYTHONPATH=os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
            TMPDIR=str(folder / "tmp"),
        )

    return run


def add_system(folder: Path, name: str, fake: str, **keys: Any) -> None:
    """A system that can only be simulated, unless ``keys`` say otherwise."""
    values = {"name": name, "target": None, "predictor": f"tests.support.fake_predictors:{fake}"} | keys
    path = folder / "conf" / "system" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def document(answer: Answer) -> dict[str, Any]:
    """The JSON document in the last line of standard output."""
    parsed: dict[str, Any] = json.loads(answer.stdout.strip().splitlines()[-1])
    return parsed


def written(folder: Path) -> list[Path]:
    """What a run has left beside its configuration."""
    own = ("conf", "tmp")
    files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    return sorted(p for p in files if p.parts[0] not in own)
