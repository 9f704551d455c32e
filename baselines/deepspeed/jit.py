"""DeepSpeed compiles its C++ operators at first use: is everything for that there, and is nothing in its way?"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

from flexgen_bench.core.errors import CannotRun


def check_async_io_buildable() -> None:
    """Raise CannotRun naming what the asynchronous I/O operator cannot be built without."""
    use_own_programs()
    compiler = os.environ.get("CXX", "g++")
    missing = [name for name in (compiler, "ninja") if shutil.which(name) is None]
    if missing:
        raise CannotRun(
            f"offload=nvme compiles an operator and needs {' and '.join(missing)}. "
            "Install them, e.g. apt-get install g++ and pip install ninja."
        )
    header = subprocess.run(
        [compiler, "-E", "-x", "c++", "-"], input="#include <libaio.h>\n", capture_output=True, text=True, check=False
    )
    if header.returncode != 0:
        raise CannotRun("offload=nvme needs the header libaio.h. Install it, e.g. apt-get install libaio-dev.")


def use_own_programs() -> None:
    """Let build steps find the programs installed beside this Python (ninja), activated or not."""
    own = str(Path(sys.executable).parent)
    paths = os.environ.get("PATH", "").split(os.pathsep)
    if own not in paths:
        os.environ["PATH"] = os.pathsep.join([own, *paths])


def extension_folders() -> list[Path]:
    """Every folder of an operator built, or begun to be built, by torch's extension loader."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    # The default root has one more level, named after the versions of Python and CUDA.
    return [path.parent for pattern in ("*/build.ninja", "*/*/build.ninja") for path in root.glob(pattern)] + [
        path.parent for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern)
    ]


def is_built(operator: str) -> bool:
    """Whether an operator's library is there already."""
    return any(folder.name == operator and any(folder.glob("*.so")) for folder in extension_folders())


def delete_stale_locks() -> list[Path]:
    """Delete the locks of builds that have died; every later build would wait on them for ever.

    A living build keeps its lock file open; a lock that no process holds open is stale.
    """
    locks = {folder / "lock" for folder in extension_folders() if (folder / "lock").exists()}
    if not locks:
        return []
    held = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # ended meanwhile, or not ours to look at
            held |= {Path(file.path) for file in process.open_files()}
    stale = [lock for lock in locks if lock.resolve() not in held]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale
