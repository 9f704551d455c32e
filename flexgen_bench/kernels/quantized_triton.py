"""Dequantization on CUDA in one kernel: codes and parameters are read once, values written once.

Layout and formula are those of kernels/quantization.py. Imported only where Triton is there and can compile for the
device.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

from flexgen_bench.core.microscaling import Codes, Microscaling

BLOCK = 1024  # values per program: a warp's lanes read neighbouring codes and write neighbouring values


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _dequantize(  # type: ignore[no-untyped-def, unused-ignore]
    codes,
    numbers,
    out,
    n,
    row_bytes,
    groups,
    bits: tl.constexpr,
    group_size: tl.constexpr,
    is_micro: tl.constexpr,
    block: tl.constexpr,
):
    """One program: ``block`` values of one row. All three tensors are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < n
    group = column // group_size
    j = column % group_size  # value within its group
    # Values that the group has room for: a short last one is filled up to a multiple of 8. Not 0 beyond the row either.
    m = tl.minimum(group_size, tl.maximum(8, (n - group * group_size + 7) // 8 * 8))
    start = codes + row * row_bytes + group * (group_size // 8 * bits)
    if bits == 8:
        code = tl.load(start + j, mask=inside, other=0).to(tl.int32)
    elif bits == 4:
        half = m // 2
        high = j >= half
        byte = tl.load(start + tl.where(high, j - half, j), mask=inside, other=0).to(tl.int32)
        code = tl.where(high, byte >> 4, byte & 15)
    else:
        e = m // 8
        part = j // e
        i = j % e
        # Parts 0 to 5 lie in pairs in the three planes; 6 and 7 in the upper bits of planes 0 and 2, and of plane 1.
        plane = tl.where(part < 6, part // 2, tl.where(part == 6, 0, 2))
        byte = tl.load(start + plane * e + i, mask=inside, other=0).to(tl.int32)
        middle = tl.load(start + e + i, mask=inside & (part >= 6), other=0).to(tl.int32)
        shared = (byte >> (part % 2 * 3)) & 7
        last = (byte >> 6) | (((middle >> tl.where(part == 6, 6, 7)) & 1) << 2)
        code = tl.where(part < 6, shared, last)
    if is_micro:
        # E2M1 without its sign: 0, 0.5, then (1 + half) * 2^exponent.
        half = (code & 1) * 0.5
        two = (code >> 1) & 3
        size = tl.where(two == 0, half, (1.0 + half) * tl.where(two == 3, 4.0, tl.where(two == 2, 2.0, 1.0)))
        power = tl.load(numbers + row * groups + group, mask=inside, other=127).to(tl.int32)
        scale = tl.where(power == 0, 0x400000, power << 23).to(tl.float32, bitcast=True)
        value = tl.where(code >= 8, -size, size) * scale
        tl.store(out + row * n + column, value.to(out.dtype.element_ty), mask=inside)
        return
    first = numbers + (row * groups + group) * 2
    scale = tl.load(first, mask=inside, other=0).to(tl.float32)
    smallest = tl.load(first + 1, mask=inside, other=0).to(tl.float32)
    value = smallest + code.to(tl.float32) * scale  # exact product: contraction changes nothing
    tl.store(out + row * n + column, value.to(out.dtype.element_ty), mask=inside)


def dequantize_with_triton(codes: Tensor, params: Tensor, out: Tensor, compression: Codes) -> None:
    """codes (R, bytes), params (R, groups, 2), of MXFP4 (R, groups) -> out (R, n), contiguous; the same bits as the
    torch path gives."""
    rows, n = out.shape
    grid = (rows, triton.cdiv(n, BLOCK))
    with torch.cuda.device(out.device):
        _dequantize[grid](
            codes.contiguous(),
            params.contiguous(),
            out,
            n,
            codes.shape[1],
            params.shape[1],
            bits=compression.bits,
            group_size=compression.group_size,
            is_micro=isinstance(compression, Microscaling),
            block=BLOCK,
        )
