"""Host memory of exact size, page-aligned for direct I/O, registered with CUDA when a GPU is to read it."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import torch
from torch import Tensor

from flexgen_bench.core.units import PAGE, aligned

HUGE_PAGE = 2**21


class _Region(mmap.mmap):
    """Anonymous memory that is unregistered from CUDA before it is unmapped, when its last tensor is gone.

    A weak reference would be told only after the unmapping, when the addresses may belong to somebody else already.
    """

    registered_at = 0

    def __del__(self) -> None:
        if self.registered_at:
            torch.cuda.cudart().cudaHostUnregister(self.registered_at)


def allocate(num_bytes: int, pinned: bool = False) -> Tensor:
    """A page-aligned uint8 tensor of exactly ``num_bytes`` (rounded up to a page) from the system, zeroed.

    torch's own pinned allocator rounds up to powers of two; anonymous memory registered with CUDA does not. Whoever
    frees pinned memory must know that no copy still uses it: torch knows nothing of it.
    Raises MemoryError if the system refuses.
    """
    size = max(PAGE, aligned(num_bytes))
    try:
        region = _Region(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot allocate {size} bytes of host memory: {error}") from error
    if size >= HUGE_PAGE:
        # One piece of memory for the disk to write to instead of 512, and fewer to page-lock: direct reads into
        # scattered plain pages run at down to 65 % of the rate (docs/notes/streaming.md). Some kernels have none.
        with contextlib.suppress(OSError):
            region.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(region, dtype=torch.uint8)
    if pinned:
        _register(region, tensor.data_ptr(), size)
    return tensor


def _register(region: _Region, address: int, size: int) -> None:
    """Page-lock memory for CUDA until it is unmapped."""
    runtime = torch.cuda.cudart()
    status = runtime.cudaHostRegister(address, size, 0)
    if int(status) != 0:
        _forget_error()
        raise MemoryError(
            f"CUDA cannot page-lock {size} bytes of host memory: {runtime.cudaGetErrorString(status)} (error "
            f"{int(status)}). Free host memory, lower gpu.cpu_memory, or move weights or kv_cache to another tier."
        )
    region.registered_at = address


def _forget_error() -> None:
    """CUDA keeps its last error for whoever launches a kernel next, which must not be an innocent one."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def group_limit() -> int | None:
    """The memory limit of this process's control group (a container, a capped cell), in bytes; None if there is
    none."""
    limits = []
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
            limits.append(int(text))
    return min(limits, default=None)


def _read(path: Path) -> str:
    """A file's text; empty where the kernel does not offer it."""
    try:
        return path.read_text()
    except OSError:
        return ""
