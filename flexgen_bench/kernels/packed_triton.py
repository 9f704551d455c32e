"""A cache in 4 or 8 bits on CUDA: a new token is quantized into its place by one kernel, and all tokens are attended to
by another.

Layout and formulas are those of kernels/quantization.py. Imported only where Triton is there and can compile for the
device. S sequences, H query heads, G KV heads, D head dim, T tokens, C bytes of codes of a row.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

from flexgen_bench.core.compression import Compression

BLOCK_TOKENS = 32  # of a program's tile of keys or values
_LARGEST = tl.constexpr(65504.0)  # float16's
# Added and taken away, it rounds float32 to whole numbers, halves to even: beyond 2^23 there are no others.
_TO_WHOLE = tl.constexpr(12582912.0)
_MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _append(  # type: ignore[no-untyped-def, unused-ignore]
    k,
    v,
    codes,
    params,
    groups,
    n,
    k_sequence,
    k_head,
    v_sequence,
    v_head,
    codes_which,
    codes_sequence,
    codes_head,
    params_which,
    params_sequence,
    params_head,
    bits: tl.constexpr,
    size: tl.constexpr,
    block: tl.constexpr,
):
    """One program: one group of one head's key (third axis even) or value (odd). Only the last axis of each tensor is
    contiguous."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    which = tl.program_id(2) % 2
    group = tl.program_id(2) // 2
    width = tl.minimum(size, n - group * size)  # a last group may be short
    room = (width + 7) // 8 * 8  # and is filled up with code 0
    at = tl.arange(0, block)
    if which == 0:
        row = k + sequence * k_sequence + head * k_head + group * size
    else:
        row = v + sequence * v_sequence + head * v_head + group * size
    x = tl.load(row + at, mask=at < width, other=0).to(tl.float32)
    low = tl.min(tl.where(at < width, x, float("inf")), axis=0)
    high = tl.max(tl.where(at < width, x, _MINUS_INFINITY), axis=0)
    zero = tl.sum(x * 0, axis=0)  # NaN if anything is infinite or NaN
    low = tl.minimum(tl.maximum(low, -_LARGEST), _LARGEST)
    high = tl.minimum(tl.maximum(high, -_LARGEST), _LARGEST)
    smallest = low.to(tl.float16).to(tl.float32)
    largest = high.to(tl.float16).to(tl.float32)
    levels = (1 << bits) - 1
    scale = tl.div_rn(largest - smallest, levels + 0.0).to(tl.float16)
    beyond = smallest + scale.to(tl.float32) * levels > _LARGEST
    below = (scale.to(tl.int16, bitcast=True) - 1).to(tl.float16, bitcast=True)
    scale = tl.where(beyond, below, scale)
    divisor = tl.where(scale == 0, float("inf"), scale.to(tl.float32))
    base = codes + which * codes_which + sequence * codes_sequence + head * codes_head
    base += group * (size // 8 * bits)
    if bits == 8:
        code = _nearest(x, smallest, divisor, levels)
        tl.store(base + at, tl.where(at < width, code, 0).to(tl.uint8), mask=at < room)
    else:
        half = room // 2
        upper = tl.load(row + half + at, mask=half + at < width, other=0).to(tl.float32)
        first = tl.where(at < width, _nearest(x, smallest, divisor, levels), 0)
        second = tl.where(half + at < width, _nearest(upper, smallest, divisor, levels), 0)
        tl.store(base + at, (first + second * 16).to(tl.uint8), mask=at < half)
    own = params + which * params_which + sequence * params_sequence + head * params_head + group * 2
    tl.store(own, scale)
    tl.store(own + 1, tl.where(zero == 0, smallest, zero).to(tl.float16))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _nearest(x, smallest, divisor, levels):  # type: ignore[no-untyped-def, unused-ignore]
    code = tl.div_rn(x - smallest, divisor)
    code = (code + _TO_WHOLE) - _TO_WHOLE
    return tl.minimum(tl.maximum(code, 0.0), levels + 0.0).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _attend(  # type: ignore[no-untyped-def, unused-ignore]  # noqa: PLR0915
    q,
    codes,
    params,
    mask,
    sinks,
    out,
    tokens,
    n,
    queries_per_head,
    scale,
    q_sequence,
    q_head,
    codes_which,
    codes_sequence,
    codes_head,
    codes_token,
    params_which,
    params_sequence,
    params_head,
    params_token,
    mask_sequence,
    out_sequence,
    has_mask: tl.constexpr,
    has_sinks: tl.constexpr,
    bits: tl.constexpr,
    size: tl.constexpr,
    columns: tl.constexpr,
    block: tl.constexpr,
):
    """One program: one query head of one sequence over all its tokens (online softmax, Milakov & Gimelshein 2018). A
    byte of 4 bits holds two values of its group: those of the lower halves are column 0, those of the upper ones column
    1 of what is summed."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, columns)  # bytes of a row
    if bits == 8:
        group = at // size
        first = at
        second = at
        inside = at < n
        also = at < 0
    else:
        group = at // (size // 2)
        room = tl.minimum(size, (n - group * size + 7) // 8 * 8)
        first = group * size + at % (size // 2)
        second = first + room // 2
        inside = (first < n) & (at % (size // 2) < room // 2)
        also = inside & (second < n)
    queries = q + sequence * q_sequence + head * q_head
    q_first = tl.load(queries + first, mask=inside, other=0).to(tl.float32)
    q_second = tl.load(queries + second, mask=also, other=0).to(tl.float32)
    kv_head = head // queries_per_head
    keys = codes + sequence * codes_sequence + kv_head * codes_head
    key_params = params + sequence * params_sequence + kv_head * params_head
    most = _MINUS_INFINITY
    total = 0.0
    sum_first = tl.zeros((columns,), dtype=tl.float32)
    sum_second = tl.zeros((columns,), dtype=tl.float32)
    for start in range(0, tokens, block):
        token = (start + tl.arange(0, block)).to(tl.int64)
        there = token < tokens
        rows = keys + token[:, None] * codes_token + at[None, :]
        numbers = key_params + token[:, None] * params_token + group[None, :] * 2
        load_mask = there[:, None] & inside[None, :]
        low, high = _values(rows, numbers, load_mask, bits, out.dtype.element_ty)
        scores = tl.sum(low * q_first[None, :], axis=1)
        if bits != 8:
            scores += tl.sum(high * q_second[None, :], axis=1)
        scores = scores * scale
        if has_mask:
            scores += tl.load(mask + sequence * mask_sequence + token, mask=there, other=0).to(tl.float32)
        scores = tl.where(there, scores, _MINUS_INFINITY)
        peak = tl.maximum(most, tl.max(scores, axis=0))
        safe = tl.where(peak == _MINUS_INFINITY, 0.0, peak)  # nothing but padding so far
        kept = tl.exp(most - safe)
        weights = tl.exp(scores - safe)
        total = total * kept + tl.sum(weights, axis=0)
        low, high = _values(rows + codes_which, numbers + params_which, load_mask, bits, out.dtype.element_ty)
        sum_first = sum_first * kept + tl.sum(weights[:, None] * low, axis=0)
        if bits != 8:
            sum_second = sum_second * kept + tl.sum(weights[:, None] * high, axis=0)
        most = peak
    if has_sinks:
        total += tl.exp(tl.load(sinks + head) - most)
    target = out + sequence * out_sequence + head * n
    tl.store(target + first, (sum_first / total).to(out.dtype.element_ty), mask=inside)
    tl.store(target + second, (sum_second / total).to(out.dtype.element_ty), mask=also)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _values(rows, numbers, load_mask, bits: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def, unused-ignore]
    """What codes stand for, rounded to the model's type: of the lower and of the upper halves (of 8 bits: the same,
    twice)."""
    code = tl.load(rows, mask=load_mask, other=0).to(tl.int32)
    step = tl.load(numbers, mask=load_mask, other=0).to(tl.float32)
    smallest = tl.load(numbers + 1, mask=load_mask, other=0).to(tl.float32)
    first = code if bits == 8 else code & 15
    second = code if bits == 8 else code >> 4
    low = smallest + first.to(tl.float32) * step
    high = smallest + second.to(tl.float32) * step
    return low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)


def append(k: Tensor, v: Tensor, codes: Tensor, params: Tensor, compression: Compression) -> None:
    """k and v (S, G, D) into their places, codes (2, S, G, C) and params (2, S, G, groups, 2): the bits that
    ``quantize`` gives; the smallest value of a group that holds NaN or infinities becomes NaN."""
    sequences, heads, n = k.shape
    groups, size = params.shape[-2], compression.group_size
    _append[sequences, heads, 2 * groups](
        k,
        v,
        codes,
        params,
        groups,
        n,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        *codes.stride()[:3],
        *params.stride()[:3],
        bits=compression.bits,
        size=size,
        block=triton.next_power_of_2(min(size, n)),
    )


def attend(
    q: Tensor,
    codes: Tensor,
    params: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    compression: Compression,
) -> Tensor:
    """q (S, H, D), codes (2, S, G, T, C), params (2, S, G, T, groups, 2), mask (S, 1, 1, T): added to scores,
    sinks (H,) float32: see ``score_mod.softmax`` -> (S, H * D)."""
    sequences, heads, n = q.shape
    out = torch.empty(sequences, heads * n, dtype=q.dtype, device=q.device)
    tokens, width = codes.shape[3], codes.shape[4]
    _attend[sequences, heads](
        q,
        codes,
        params,
        q if mask is None else mask,
        q if sinks is None else sinks,
        out,
        tokens,
        n,
        heads // codes.shape[2],
        scale,
        q.stride(0),
        q.stride(1),
        *codes.stride()[:4],
        *params.stride()[:4],
        0 if mask is None else mask.stride(0),
        out.stride(0),
        has_mask=mask is not None,
        has_sinks=sinks is not None,
        bits=compression.bits,
        size=compression.group_size,
        columns=triton.next_power_of_2(width),
        block=BLOCK_TOKENS,
    )
    return out
