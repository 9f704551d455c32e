"""Host memory of exact size, page-aligned for direct I/O, registered with CUDA when a GPU is to read it."""

from __future__ import annotations

import mmap

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
        status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size, 0)
        if int(status) != 0:
            raise MemoryError(f"cudaHostRegister refused {size} bytes (error {int(status)})")
    return tensor


def release_pinned(tensor: Tensor) -> None:
    """Undo the registration of a tensor from ``allocate(..., pinned=True)``."""
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
