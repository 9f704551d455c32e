"""Compiles ``native/<name>.cpp`` for this processor (or what the environment leaves of it), once, and loads it.

A source exports ``extern "C"`` functions over pointers and sizes and includes nothing of torch, so a build is one
command of a few seconds, and ctypes lets go of the interpreter lock during a call.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
import threading
from pathlib import Path

from flexgen_bench.core.instructions import NATIVE_SWITCH as SWITCH
from flexgen_bench.core.instructions import native_arch

FOLDER = Path(__file__).parent
# No -ffast-math: with it the linker adds start-up code that makes the whole process flush small numbers to zero.
# No OpenMP runtime: torch brings its own, and threads wait in native/threads.h.
FLAGS = (
    "-O3",
    "-std=gnu++20",
    "-fPIC",
    "-shared",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
)
BUILD_SECONDS = 300

_log = logging.getLogger("flexgen_bench.native")
_lock = threading.Lock()
_said: set[str] = set()


def library(name: str) -> ctypes.CDLL | None:
    """The library made from ``native/<name>.cpp``; None where it cannot be had, for a reason that is logged once.

    The environment variable FLEXGEN_NATIVE=0 turns all of them off, FLEXGEN_NATIVE_ARCH=x86-64-v3 (or another -march of
    the compiler) says what to compile for; both are read at every call. Processes under different ones share the folder
    of builds.
    """
    if os.environ.get(SWITCH) == "0":
        _say_switched_off()
        return None
    with _lock:  # two lanes may ask at the same time
        return _load(name, native_arch())


@functools.cache
def _say_switched_off() -> None:
    _log.info("no native kernels, torch does their work: %s=0", SWITCH)


@functools.cache
def _load(name: str, arch: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_built(name, arch)))
    # Whatever is missing or odd about the machine's compiler, there is a torch path for everything done here.
    except (OSError, ImportError, subprocess.SubprocessError) as error:
        detail = str(getattr(error, "stderr", None) or error).strip()[:500]
        # A compiler that is missing is missing for all of them: said once.
        _log.log(
            logging.INFO if detail in _said else logging.WARNING, "no native %s, torch does its work: %s", name, detail
        )
        _said.add(detail)
        return None


def builds_folder() -> Path:
    """Where everything lies that is compiled on this machine; it may not exist yet."""
    # It takes a tenth of a second to import, and only a first use needs it.
    from torch.utils import cpp_extension

    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return Path(root) / "flexgen_bench"


def _built(name: str, arch: str) -> Path:
    """The compiled file, built first if this source, compiler, flags and processor have none yet.

    Two processes may build the same at once: each writes a file of its own and renames it, so there is no lock that a
    killed build could leave behind, and a file with the final name is complete.
    """
    from torch.utils import cpp_extension

    source = FOLDER / f"{name}.cpp"
    command = [*shlex.split(cpp_extension.get_cxx_compiler()), *FLAGS, f"-march={arch}"]
    key = hashlib.sha256(source.read_bytes())
    for header in sorted(FOLDER.glob("*.h")):
        key.update(header.read_bytes())
    key.update("\0".join([*command, _processor()]).encode())
    folder = builds_folder()
    target = folder / f"{name}-{key.hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / target.name
            subprocess.run(
                [*command, str(source), "-o", str(made)],
                check=True,
                capture_output=True,
                text=True,
                timeout=BUILD_SECONDS,
            )
            made.replace(target)
    return target


def _processor() -> str:
    """What -march=native depends on: the folder may be shared by machines, or move to another one."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = ("flags", "Features", "model", "cpu family", "CPU part", "vendor_id")
    lines = [line for line in text.splitlines() if line.startswith(kept)]
    return platform.machine() + "\n".join(dict.fromkeys(lines))
