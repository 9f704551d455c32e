"""The command line in a process of its own, as people start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_command(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python -m flexgen_bench ARGUMENTS`` in a folder. variables: of its environment, beside this process's.

    Hydra's own tracebacks are off, whatever a test before has left."""
    environment = os.environ | variables
    environment.pop("HYDRA_FULL_ERROR", None)
    return subprocess.run(
        [sys.executable, "-m", "flexgen_bench", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
