"""Decode attention by native/attention.cpp, for a cache in host memory.

S sequences, S' rows of q, H query heads, G KV heads, R = H / G, D head dim.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from flexgen_bench.core.score_mod import NO_MOD, ScoreMod
from flexgen_bench.kernels.native.build import library
from flexgen_bench.kernels.score_mod import slopes_of
from flexgen_bench.kernels.segments import Padding, PlainSegment, Segment
from flexgen_bench.kernels.value_share import kept

_KINDS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 15}
# Fewer pieces of work than this per thread, and the last one makes the others wait; fewer tokens than this in a piece,
# and starting it costs as much as doing it.
PIECES_PER_THREAD, PIECE_TOKENS = 4, 256
# Below this a second thread saves less than waking it up costs.
BYTES_PER_THREAD = 1 << 18


class _Rows(ctypes.Structure):
    """Keys or values of a segment, ``Rows`` of row_kernels.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64 * 3),
        ("params", ctypes.c_void_p),
        ("param_stride", ctypes.c_int64 * 3),
        ("tokens", ctypes.c_int64),
        ("kind", ctypes.c_int64),
        ("group", ctypes.c_int64),
    )


class _Job(ctypes.Structure):
    """``Job`` of attention.cpp."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("totals", ctypes.c_void_p),
        ("keep", ctypes.c_void_p),
        ("newest", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("segments", ctypes.c_int64),
        ("splits", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("slopes", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
    )


def attend_natively(
    q: Tensor,
    segments: Sequence[Segment],
    padding: Padding | None,
    scale: float,
    value_share: float = 1.0,
    slots: Sequence[int] | None = None,
    mod: ScoreMod = NO_MOD,
    newest: Sequence[int] | None = None,
) -> Tensor | None:
    """See ``attention.decode_attention``; None if this cache is not for the native kernel, or there is no library.

    Products are summed in float32 whatever the types of q and cache, and nothing is rounded before the result is.
    """
    if q.device.type != "cpu" or q.dtype not in _KINDS or not all(map(_is_readable, segments)):
        return None
    native = library("attention")
    if native is None:
        return None
    rows, heads, dim = q.shape
    queries = q.to(torch.float32).contiguous()
    out = torch.empty(rows, heads * dim)
    if rows == 0:
        return out.to(q.dtype)
    slot_numbers = torch.tensor(range(rows) if slots is None else slots, dtype=torch.int32)
    lengths = totals = None
    if padding is not None:
        counts = padding.lengths.to(torch.int32).contiguous()
        lengths, totals = (None, counts) if padding.of_all else (counts, None)
    keep = _kept_rows(segments, padding, slot_numbers, value_share, mod)
    last = None if newest is None or keep is None else torch.tensor(newest, dtype=torch.int32)
    kv_heads = segments[0].heads
    tokens = mod.seen(sum(segment.tokens for segment in segments))
    threads, splits = _division(rows * kv_heads, tokens, dim)
    slopes = slopes_of(mod.slopes, q.device).data_ptr() if mod.slopes else None
    if keep is not None:
        splits = 1  # which rows are used depends on the weights of all tokens
    partial = torch.empty(rows * heads * splits * (dim + 2) if splits > 1 else 0)
    job = _Job(
        queries.data_ptr(),
        out.data_ptr(),
        slot_numbers.data_ptr(),
        None if lengths is None else lengths.data_ptr(),
        None if totals is None else totals.data_ptr(),
        None if keep is None else keep.data_ptr(),
        None if last is None else last.data_ptr(),
        partial.data_ptr() or None,
        rows,
        heads,
        kv_heads,
        dim,
        len(segments),
        splits,
        mod.window or 0,
        slopes,
        scale,
        mod.soft_cap or 0.0,
    )
    keys, values = ((_Rows * len(segments))(*(_rows(s, i) for s in segments)) for i in (0, 1))

    _declared(native).attend(ctypes.byref(job), keys, values, threads)
    return out.to(q.dtype)


@functools.cache
def _declared(native: ctypes.CDLL) -> ctypes.CDLL:
    """Argument types, once per library."""
    pointer = ctypes.c_void_p
    native.attend.argtypes = [pointer, pointer, pointer, ctypes.c_int64]
    native.attend.restype = None
    return native


def _is_readable(segment: Segment) -> bool:
    """Whether rows lie in host memory as the kernel expects them."""
    if isinstance(segment, PlainSegment):
        pair = (segment.k, segment.v)
        return all(x.device.type == "cpu" and x.dtype in _KINDS and x.stride(-1) == 1 for x in pair)
    codes, params = segment.codes, segment.params
    return (
        codes.device.type == "cpu"
        and params.dtype == torch.float16
        and codes.stride(-1) == 1
        and params.stride(-1) == 1
        and params.stride(-2) == 2
    )


def _rows(segment: Segment, which: int) -> _Rows:
    """Keys (0) or values (1) of a segment."""
    strides = ctypes.c_int64 * 3
    if isinstance(segment, PlainSegment):
        x = segment.v if which else segment.k
        return _Rows(x.data_ptr(), strides(*_byte_strides(x)), None, strides(), segment.tokens, _KINDS[x.dtype], 0)
    codes, params = segment.codes[which], segment.params[which]
    return _Rows(
        codes.data_ptr(),
        strides(*_byte_strides(codes)),
        params.data_ptr(),
        strides(*_byte_strides(params)),
        segment.tokens,
        segment.compression.bits,
        segment.compression.group_size,
    )


def _byte_strides(x: Tensor) -> list[int]:
    """Of sequence, head and token."""
    return [x.stride(i) * x.element_size() for i in range(3)]


def _kept_rows(
    segments: Sequence[Segment], padding: Padding | None, slots: Tensor, value_share: float, mod: ScoreMod
) -> Tensor | None:
    """(S',) int32: how many value rows of each sequence are used; None if all are."""
    if value_share >= 1:
        return None
    later = 0 if padding is not None and padding.of_all else sum(segment.tokens for segment in segments[1:])
    first = [segments[0].tokens] * len(slots) if padding is None else padding.lengths[slots].tolist()
    return torch.tensor([kept(value_share, mod.seen(n + later)) for n in first], dtype=torch.int32)


def _division(pairs: int, tokens: int, dim: int) -> tuple[int, int]:
    """(threads, splits of each pair of sequence and KV head) for this much work."""
    # Two bytes for each value of K and of V: close enough for all types.
    threads = max(1, min(torch.get_num_threads(), pairs * tokens * dim * 4 // BYTES_PER_THREAD))
    if threads == 1 or pairs >= PIECES_PER_THREAD * threads:
        return threads, 1
    return threads, max(1, min(-(-PIECES_PER_THREAD * threads // pairs), tokens // PIECE_TOKENS))
