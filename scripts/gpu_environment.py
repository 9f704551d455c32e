"""What a GPU machine has, as JSON: ``python scripts/gpu_environment.py --out FILE``. Fails where the engine could not
work."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

QUERY = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "pcie.link.gen.max",
    "pcie.link.gen.current",
    "pcie.link.width.max",
    "pcie.link.width.current",
    "clocks.max.sm",
    "power.limit",
    "ecc.mode.current",
)
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "deepspeed",
    "hydra-core",
    "omegaconf",
    "safetensors",
    "numpy",
    "scipy",
    "pandas",
    "psutil",
    "rich",
    "pytest",
    "attrs",
    "tqdm",
    "pydantic",
)
NEEDED = (
    "torch",
    "transformers",
    "accelerate",
    "hydra-core",
    "omegaconf",
    "safetensors",
    "pandas",
    "psutil",
    "rich",
    "scipy",
)


def driver() -> dict[str, str]:
    """What nvidia-smi says; empty without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if answer.returncode != 0:
        return {"error": (answer.stdout + answer.stderr).strip()}
    first = answer.stdout.splitlines()[0].split(", ")
    return dict(zip(QUERY, first, strict=False))


def versions() -> dict[str, str | None]:
    by_name: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            by_name[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            by_name[name] = None
    return by_name


def cuda() -> dict[str, Any]:
    """torch's view of the device, and whether page-locked memory of our own works as the engine needs it."""
    import torch

    about: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "available": torch.cuda.is_available(),
    }
    if not about["available"]:
        return about
    device = torch.cuda.get_device_properties(0)
    about |= {
        "name": device.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "free_bytes": torch.cuda.mem_get_info()[0],
        "count": torch.cuda.device_count(),
        "bf16": torch.cuda.is_bf16_supported(),
    }
    return about | {"registered_memory": registered_memory()}


def registered_memory() -> dict[str, Any]:
    """A copy from memory registered with CUDA must return before it is done, or no copy overlaps with anything."""
    import time

    import torch

    from flexgen_bench.core.units import MIB
    from flexgen_bench.memory.host import allocate

    try:
        source = allocate(512 * MIB, pinned=True)
    except MemoryError as error:
        return {"works": False, "reason": str(error)}
    target = torch.empty_like(source, device="cuda")
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    target.copy_(source, non_blocking=True)
    issued_s = time.perf_counter() - start
    torch.cuda.synchronize()
    copied_s = time.perf_counter() - start
    return {
        "works": source.is_pinned() and source[4096:].is_pinned() and issued_s < copied_s / 4,
        "is_pinned": source.is_pinned(),
        "issue_s": issued_s,
        "copy_s": copied_s,
    }


def host() -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "memory_bytes": memory.total,
        "available_bytes": memory.available,
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "memlock_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "transparent_hugepages": pages.read_text().strip() if pages.exists() else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    packages = versions()
    report: dict[str, Any] = {"evidence": "MEASURED", "packages": packages}
    problems = [f"package {name} is missing" for name in NEEDED if packages[name] is None]
    report |= {"driver": driver(), "cuda": cuda() if packages["torch"] else {}}
    if not report["cuda"].get("available"):
        problems.append("torch sees no CUDA device")
    elif not report["cuda"]["registered_memory"]["works"]:
        problems.append("copies from host memory registered with CUDA are not asynchronous here")
    if packages["psutil"]:
        from flexgen_bench.config.paths import default_cache_dir
        from flexgen_bench.machine.environment import cpu_model, file_system, git_state

        report |= {"host": host(), "cpu": cpu_model(), "disk": file_system(default_cache_dir())}
        report["code"] = git_state(Path(__file__).resolve().parent)
    report["problems"] = problems
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
