"""Host memory of exact size, page-aligned for direct I/O, registered with CUDA when a GPU is to read it."""

from __future__ import annotations

import mmap
import weakref
from pathlib import Path

import torch
from torch import Tensor

PAGE = 4096


def allocate(num_bytes: int, pinned: bool = False) -> Tensor:
    """A page-aligned uint8 tensor of exactly ``num_bytes`` (rounded up to a page) from the system, zeroed.

    torch's own pinned allocator rounds up to powers of two; anonymous memory registered with CUDA does not.
    Raises MemoryError if the system refuses.
    """
    size = max(PAGE, -(-num_bytes // PAGE) * PAGE)
    try:
        region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot allocate {size} bytes of host memory: {error}") from error
    tensor = torch.frombuffer(region, dtype=torch.uint8)
    if pinned:
        _register(region, tensor.data_ptr(), size)
    return tensor


def _register(region: mmap.mmap, address: int, size: int) -> None:
    """Page-lock memory for CUDA until it is unmapped."""
    runtime = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(address, size, 0))
    if status != 0:
        raise MemoryError(f"cudaHostRegister refused {size} bytes (error {status})")
    # The tensor keeps the mapping alive, and so do its views; this runs when the last of them is gone.
    weakref.finalize(region, runtime.cudaHostUnregister, address)


def group_limit() -> int | None:
    """The memory limit of this process's control group (a container, a capped cell), in bytes; None if there is none."""
    found = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            file = Path(f"/sys/fs/cgroup{path}/memory.max")
        elif "memory" in controllers.split(","):
            file = Path(f"/sys/fs/cgroup/memory{path}/memory.limit_in_bytes")
        else:
            continue
        text = _read(file).strip()
        if text.isdigit() and int(text) < 2**60:  # "max", or a number near 2**63: no limit
            found.append(int(text))
    return min(found, default=None)


def _read(path: Path) -> str:
    """A file's text; empty where the kernel does not offer it."""
    try:
        return path.read_text()
    except OSError:
        return ""
