"""CUDA C++ of the project, made by the host's compiler: the same text, its threads taking turns on one core."""

from __future__ import annotations

import ctypes
import hashlib
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from torch.utils import cpp_extension

from flexgen_bench.kernels.native.build import builds_folder

HEADER = Path(__file__).parent / "cuda_on_host.h"
# Not contracted by the compiler: a * b + c is rounded where the text says so, as fmaf.
FLAGS = ("-O1", "-std=gnu++20", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-unknown-pragmas")


def host_library(source: Path, structure: str, calls: Mapping[str, str], threads: int) -> ctypes.CDLL:
    """The text with one C function for each of ``calls``: its name, and what each thread does with a ``structure``
    named p. Each takes (blocks, address of the structure)."""
    functions = [
        f'extern "C" void {name}(int blocks, const {structure}* given) {{ const {structure}& p = *given; '
        f"host::launch(blocks, {threads}, [&] {{ {call}; }}); }}"
        for name, call in calls.items()
    ]
    text = "\n".join(['#include "cuda_on_host.h"', source.read_text(encoding="utf-8"), *functions])
    command = [*shlex.split(cpp_extension.get_cxx_compiler()), *FLAGS, f"-I{HEADER.parent}"]
    key = hashlib.sha256("\0".join([text, HEADER.read_text(encoding="utf-8"), *command]).encode()).hexdigest()[:16]
    target = builds_folder() / f"host-cuda-{key}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_suffix(".partial.so")
        subprocess.run([*command, "-x", "c++", "-", "-o", str(made)], input=text, text=True, check=True, timeout=120)
        made.replace(target)
    return ctypes.CDLL(str(target))
