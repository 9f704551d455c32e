"""Which kernel a device has that unpacks codes in one go."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from flexgen_bench.core.microscaling import Codes
from flexgen_bench.kernels.trial import any_codes, passes, require_equal

# (codes (R, bytes), params (R, groups, 2), of MXFP4 (R, groups), out (R, n), how they are compressed)
Unpack = Callable[[Tensor, Tensor, Tensor, Codes], None]


def unpacking_kernel(device: torch.device, compression: Codes, dtype: torch.dtype, reference: Unpack) -> Unpack | None:
    """Into values of ``dtype``; None on processors, and where Triton is missing or does not give the bits of the
    ``reference``."""
    return _tried(device, compression, dtype, reference) if device.type == "cuda" else None


@functools.cache
def _tried(device: torch.device, compression: Codes, dtype: torch.dtype, reference: Unpack) -> Unpack | None:
    """Triton promises to support compute capability 8.0 and later. It does compile these for a T4 (7.5), whose numbers
    are looked at before they are used: docs/notes/packed_products.md."""
    made: list[Unpack] = []

    def try_it() -> None:
        from flexgen_bench.kernels.quantized_triton import dequantize_with_triton

        n = 3 * compression.group_size
        codes, params = any_codes(3, n, compression, device)
        found, expected = (torch.full((3, n), torch.nan, dtype=dtype, device=device) for _ in range(2))
        dequantize_with_triton(codes, params, found, compression)
        reference(codes, params, expected, compression)
        require_equal(found, expected)
        made.append(dequantize_with_triton)

    lost = "they are unpacked by torch's operators, which move five times as many bytes."
    return made[0] if passes(try_it, f"Triton kernel that unpacks {compression} values", lost) else None
