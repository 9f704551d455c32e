"""Decode attention by native/attention.cpp, for a cache in host memory.

S sequences, S' rows of q, H query heads, G KV heads, R = H / G, D head dim.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

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
        ("keys", ctypes.POINTER(_Rows)),
        ("values", ctypes.POINTER(_Rows)),
        ("new_k", ctypes.c_void_p),
        ("new_v", ctypes.c_void_p),
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
        ("q_row", ctypes.c_int64),
        ("k_row", ctypes.c_int64),
        ("v_row", ctypes.c_int64),
        ("place", ctypes.c_int64),
        ("type", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("slopes", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
    )


class NativeAttention:
    """Attention of some rows over one cache, made ready by ``prepared``, to be called with queries."""

    def __init__(self, native: ctypes.CDLL, job: _Job, rows: Sequence[Any], kept_alive: Sequence[object]) -> None:
        """rows: arrays of ``_Rows``, keys and values; kept_alive: what else the job points to."""
        self._native, self._attend = native, _declared(native).attend
        self._job, self._rows, self._kept_alive = job, rows, kept_alive

    def __call__(self, q: Tensor, new: tuple[Tensor, Tensor] | None = None, sinks: Tensor | None = None) -> Tensor:
        """q (S', H, D) -> (S', H * D). new: keys and values (S', G, D) to write to their place in the cache first;
        plain, of its type. sinks (H,) float32."""
        job, q = self._job, _with_whole_rows(q)
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype)
        job.q, job.q_row, job.out = q.data_ptr(), q.stride(0), out.data_ptr()
        if new is not None:
            k, v = map(_with_whole_rows, new)
            job.new_k, job.new_v, job.k_row, job.v_row = k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0)
        job.sinks = None if sinks is None else sinks.data_ptr()
        self._attend(ctypes.byref(job))
        return out

    def moved(self, distance: int) -> NativeAttention:
        """The same over a plain cache of the same form ``distance`` bytes further on in the same memory. What they
        compute in is shared: they are called one after the other."""
        job = _Job.from_buffer_copy(self._job)
        both = [(_Rows * job.segments).from_buffer_copy(rows) for rows in self._rows]
        for rows in both:
            for segment in rows:
                if segment.data is not None:  # one without tokens lies nowhere
                    segment.data += distance
        job.keys, job.values = both
        return NativeAttention(self._native, job, both, self._kept_alive)


def attend_natively(
    q: Tensor,
    segments: Sequence[Segment],
    padding: Padding | None,
    scale: float,
    value_share: float = 1.0,
    slots: Sequence[int] | None = None,
    mod: ScoreMod = NO_MOD,
    sinks: Tensor | None = None,
    newest: Sequence[int] | None = None,
) -> Tensor | None:
    """See ``attention.decode_attention``; None if this cache is not for the native kernel, or there is no library.

    Products are summed in float32 whatever the types of q and cache, and nothing is rounded before the result is.
    """
    if q.device.type != "cpu":
        return None
    attend = prepared(q.shape, q.dtype, segments, padding, scale, value_share, slots, mod, newest)
    return None if attend is None else attend(q, sinks=sinks)


def prepared(
    shape: Sequence[int],
    dtype: torch.dtype,
    segments: Sequence[Segment],
    padding: Padding | None,
    scale: float,
    value_share: float = 1.0,
    slots: Sequence[int] | None = None,
    mod: ScoreMod = NO_MOD,
    newest: Sequence[int] | None = None,
    place: int | None = None,
) -> NativeAttention | None:
    """Attention of queries of this shape, (S', H, D), and type. place: of a new token in the last segment; None: the
    last one. For the rest see ``attend_natively``."""
    if dtype not in _KINDS or not all(map(_is_readable, segments)):
        return None
    native = library("attention")
    if native is None:
        return None
    rows, heads, dim = shape
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
    slopes = slopes_of(mod.slopes, torch.device("cpu")) if mod.slopes else None
    if keep is not None:
        splits = 1  # which rows are used depends on the weights of all tokens
    partial = torch.empty(rows * heads * splits * (dim + 2) if splits > 1 else 0)
    keys, values = ((_Rows * len(segments))(*(_rows(s, i) for s in segments)) for i in (0, 1))
    job = _Job(
        keys=keys,
        values=values,
        slots=slot_numbers.data_ptr(),
        lengths=None if lengths is None else lengths.data_ptr(),
        totals=None if totals is None else totals.data_ptr(),
        keep=None if keep is None else keep.data_ptr(),
        newest=None if last is None else last.data_ptr(),
        partial=partial.data_ptr() or None,
        rows=rows,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        segments=len(segments),
        place=segments[-1].tokens - 1 if place is None else place,
        splits=splits,
        type=_KINDS[dtype],
        threads=threads,
        window=mod.window or 0,
        slopes=None if slopes is None else slopes.data_ptr(),
        scale=scale,
        soft_cap=mod.soft_cap or 0.0,
    )
    kept_alive = (slot_numbers, lengths, totals, keep, last, partial, slopes, segments)
    return NativeAttention(native, job, (keys, values), kept_alive)


def _with_whole_rows(x: Tensor) -> Tensor:
    """(S, H, D) with the heads of a row one after the other."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


@functools.cache
def _declared(native: ctypes.CDLL) -> ctypes.CDLL:
    """Argument types, once per library."""
    native.attend.argtypes, native.attend.restype = [ctypes.c_void_p], None
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
