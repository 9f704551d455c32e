"""Which kernels a device has for a compressed cache that stays in its memory: one to append a token, one to attend."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen_bench.core.compression import Compression, Scales

_log = logging.getLogger("flexgen_bench.kernels")
_BITS = (4, 8)


class PackedKernels(NamedTuple):
    """append: (k, v, codes, params, compression); attend: (q, codes, params, mask, sinks, scale,
    compression) -> output. See
    ``packed_triton.py``."""

    append: Callable[[Tensor, Tensor, Tensor, Tensor, Compression], None]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float, Compression], Tensor]


def packed_kernels(device: torch.device, compression: Compression, dtype: torch.dtype) -> PackedKernels | None:
    """None where there are none: other numbers of bits, scales that are searched for, no CUDA device of compute
    capability 8.0 or later, no Triton."""
    if device.type != "cuda" or compression.bits not in _BITS:
        return None
    if compression.scales is not Scales.MINMAX:
        return None
    return _tried(device, compression, dtype)


@functools.cache
def _tried(device: torch.device, compression: Compression, dtype: torch.dtype) -> PackedKernels | None:
    """Once on a token: what cannot be compiled here costs speed, and no run."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if importlib.util.find_spec("triton") is None:
        return None
    from flexgen_bench.kernels.packed_triton import append, attend

    kernels = PackedKernels(append, attend)
    try:
        with torch.cuda.device(device):
            _try(kernels, device, compression, dtype)
    except Exception as error:  # a compiler's errors have no type of their own
        _log.warning(
            "Triton cannot compile the kernels for a compressed KV cache here (%s: %s): it is unpacked with torch's "
            "operators, some hundred kernels per layer instead of two.",
            type(error).__name__,
            str(error).strip().splitlines()[0] if str(error).strip() else "no reason given",
        )
        return None
    return kernels


def _try(kernels: PackedKernels, device: torch.device, compression: Compression, dtype: torch.dtype) -> None:
    dim = compression.group_size
    row = torch.ones(1, 1, dim, dtype=dtype, device=device)
    codes = torch.zeros(2, 1, 1, 1, compression.code_bytes(dim), dtype=torch.uint8, device=device)
    params = torch.zeros(2, 1, 1, 1, compression.groups(dim), 2, dtype=torch.float16, device=device)
    kernels.append(row, row, codes[:, :, :, 0], params[:, :, :, 0], compression)
    kernels.attend(row, codes, params, None, None, 1.0, compression)
    torch.cuda.synchronize(device)
