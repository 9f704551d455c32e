"""What the machine in front of us has: processors, memory, disk, GPUs. Asked without importing torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil


@dataclass(frozen=True)
class LocalGpu:
    """One NVIDIA GPU as its driver names it. ``memory_bytes`` is None where only the name is known."""

    name: str
    memory_bytes: int | None


@cache
def local_gpus() -> tuple[LocalGpu, ...]:
    """The GPUs that the driver shows, as nvidia-smi tells them, else as /proc does. Empty without a driver."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return ()
    return _from_nvidia_smi() or _from_proc()


def _from_nvidia_smi() -> tuple[LocalGpu, ...]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    try:
        answer = subprocess.run(
            [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()  # an installed tool without a working driver: there is no usable GPU
    gpus = []
    for line in answer.stdout.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if name.strip():
            size = mebibytes.strip()
            gpus.append(LocalGpu(name.strip(), int(size) * 2**20 if size.isdigit() else None))
    return tuple(gpus)


def _from_proc() -> tuple[LocalGpu, ...]:
    gpus = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text().splitlines():
            if line.startswith("Model:"):
                gpus.append(LocalGpu(line.removeprefix("Model:").strip(), None))
    return tuple(gpus)


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build, judged by its version (``2.13.0+cpu`` is not)."""
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def memory_bytes() -> int:
    """The host's physical memory."""
    return int(psutil.virtual_memory().total)


def free_disk_bytes(folder: Path) -> int:
    """Free bytes for this user on the file system that ``folder`` (or its nearest existing parent) is on."""
    here = folder.expanduser().absolute()
    while not here.exists():
        here = here.parent
    return shutil.disk_usage(here).free


def logical_cores() -> int:
    """Hardware threads this process may use."""
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else _all()


def _all() -> int:
    return psutil.cpu_count() or 1


def physical_cores() -> int:
    """Physical cores this process may use: the default thread count."""
    return max(1, min(psutil.cpu_count(logical=False) or _all(), logical_cores()))


# Of cores, what the lanes that issue to a GPU get for themselves, on machines with more than a few.
_ISSUING, _FEW = 2, 4


def threads_beside_a_gpu(threads: int) -> int:
    """Of ``threads`` that may compute, those that the cpu lane takes while other lanes issue work to a GPU: they need
    cores, or the GPU waits for them. Cores that are idle anyway count."""
    cores = physical_cores() if threads <= physical_cores() else logical_cores()
    return threads - max(0, _ISSUING - (cores - threads)) if cores > _FEW else threads
