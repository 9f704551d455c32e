"""Which kernels a device has for a compressed cache that stays in its memory: one to append a token, one to attend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen_bench.core.compression import Compression, Scales
from flexgen_bench.kernels.quantization import quantize
from flexgen_bench.kernels.segments import PackedSegment
from flexgen_bench.kernels.trial import passes, require_close, require_equal

_BITS = (4, 8)


class PackedKernels(NamedTuple):
    """append: (k, v, codes, params, compression); attend: (q, codes, params, mask, sinks, scale,
    compression) -> output. See
    ``packed_triton.py``."""

    append: Callable[[Tensor, Tensor, Tensor, Tensor, Compression], None]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float, Compression], Tensor]


def packed_kernels(device: torch.device, compression: Compression, dtype: torch.dtype) -> PackedKernels | None:
    """None where there are none: other numbers of bits, scales that are searched for, no CUDA device, no Triton, or one
    that does not make them right."""
    if device.type != "cuda" or compression.bits not in _BITS:
        return None
    if compression.scales is not Scales.MINMAX:
        return None
    return _tried(device, compression, dtype)


@functools.cache
def _tried(device: torch.device, compression: Compression, dtype: torch.dtype) -> PackedKernels | None:
    """Once, on two tokens. Triton promises to support compute capability 8.0 and later, and compiles these for a T4
    (7.5): docs/notes/packed_products.md."""
    made: list[PackedKernels] = []

    def try_it() -> None:
        from flexgen_bench.kernels.packed_triton import append, attend

        kernels = PackedKernels(append, attend)
        with torch.cuda.device(device):
            check(kernels, device, compression, dtype)
        made.append(kernels)

    lost = "it is unpacked by torch's operators, some hundred kernels per layer instead of two."
    what = f"Triton kernels for a cache in {compression}"
    return made[0] if passes(try_it, what, lost) else None


def check(kernels: PackedKernels, device: torch.device, compression: Compression, dtype: torch.dtype) -> None:
    """Raises what kernels raise, or WrongNumbers."""
    dim = compression.group_size
    q, *kv = torch.randn(5, 1, 1, dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    codes = torch.zeros(2, 1, 1, 2, compression.code_bytes(dim), dtype=torch.uint8, device=device)
    params = torch.zeros(2, 1, 1, 2, compression.groups(dim), 2, dtype=torch.float16, device=device)
    for token, (k, v) in enumerate((kv[:2], kv[2:])):
        kernels.append(k, v, codes[:, :, :, token], params[:, :, :, token], compression)
        for which, row in enumerate((k, v)):
            expected = quantize(
                row.cpu(), compression
            )  # a GPU's torch multiplies by the inverse where it says it divides
            require_equal(codes[which, :, :, token].cpu(), expected[0])
            require_equal(params[which, :, :, token].cpu(), expected[1])
    segment = PackedSegment(codes, params, compression, dim)
    keys, values = segment.keys(dtype)[0, 0].double(), segment.values(dtype)[0, 0].double()
    weights = (keys @ q[0, 0].double() * 0.5).softmax(0)
    require_close(kernels.attend(q, codes, params, None, None, 0.5, compression)[0], weights @ values)
