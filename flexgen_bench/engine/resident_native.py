"""Decode attention of a resident micro-batch by the native kernel: one call per run and layer, which also appends.

S sequences of a run, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from flexgen_bench.engine.resident_cache import ByRuns, ResidentCache, Run, SinksOf
from flexgen_bench.kernels.decode_native import NativeAttention, prepared
from flexgen_bench.kernels.segments import PlainSegment
from flexgen_bench.models.parts import Attention


class ProcessorAttention(ByRuns[NativeAttention]):
    """Over a plain cache in host memory."""

    def _attend(self, view: NativeAttention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        return view(q, (k, v), sinks)


def processor_attention(
    cache: ResidentCache, attentions: Sequence[Attention], x: Tensor, sinks: SinksOf
) -> ProcessorAttention | None:
    """For queries with the type of x. attentions: of every decoder layer. None if there is no native kernel."""
    views = partial(_views, of=lambda unit: attentions[unit - 1], units=cache.units, dtype=x.dtype)
    try:
        return ProcessorAttention(cache, views, sinks)
    except _NotNative:
        return None


class _NotNative(Exception):
    """No kernel for this."""


def _views(run: Run, of: Callable[[int], Attention], units: Sequence[int], dtype: torch.dtype) -> list[NativeAttention]:
    (stored,) = run.stored
    return [_ready(run, cached, of(unit), dtype) for cached, unit in zip(stored.unbind(0), units, strict=True)]


def _ready(run: Run, cached: Tensor, attention: Attention, dtype: torch.dtype) -> NativeAttention:
    """One layer's cache (2, S, G, T, D)."""
    keys, values = cached.unbind(0)
    segments, lengths = [PlainSegment(keys, values)], None
    if run.padding is not None:  # the prompts end before the first new token
        lengths = run.padding.lengths
        halves = [t.split((run.prompt, t.shape[2] - run.prompt), 2) for t in (keys, values)]
        segments = [PlainSegment(k, v) for k, v in zip(*halves, strict=True)]
    shape = (keys.shape[0], attention.heads, attention.head_dim)
    ready = prepared(shape, dtype, segments, lengths, attention.scale, mod=attention.mod)
    if ready is None:
        raise _NotNative
    return ready
