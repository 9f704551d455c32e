"""Decode attention of a resident micro-batch by the native kernel: one call per run and layer, which also appends.

S sequences of a run, H query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from flexgen_bench.core.score_mod import ScoreMod
from flexgen_bench.engine.resident_cache import ByRuns, ResidentCache, Run, SinksOf
from flexgen_bench.kernels.decode_native import NativeAttention, prepared
from flexgen_bench.kernels.native.build import library
from flexgen_bench.kernels.segments import PlainSegment
from flexgen_bench.models.parts import Attention


class ProcessorAttention(ByRuns[NativeAttention]):
    """Over a plain cache in host memory."""

    def _attend(self, view: NativeAttention, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        return view(q, (k, v), sinks)


def processor_attention(
    cache: ResidentCache, attentions: Sequence[Attention], mods: Sequence[ScoreMod], x: Tensor, sinks: SinksOf
) -> ProcessorAttention | None:
    """For queries with the type of x. attentions, mods: of every decoder layer, and what its cache leaves to do. None
    if there is no native kernel."""
    if library("attention") is None:
        return None
    return ProcessorAttention(cache, partial(_views, attentions=attentions, mods=mods, dtype=x.dtype), sinks)


def _views(
    run: Run, attentions: Sequence[Attention], mods: Sequence[ScoreMod], dtype: torch.dtype
) -> list[NativeAttention]:
    """By layer: made once for those that attend alike, whose caches lie equally far apart."""
    (stored,) = run.stored
    apart = stored.stride(0) * stored.element_size()
    made: dict[tuple[object, ...], tuple[int, NativeAttention]] = {}
    views = []
    for layer, unit in enumerate(run.units):
        attention, mod = attentions[unit - 1], mods[unit - 1]
        key = (attention.heads, attention.head_dim, attention.scale, mod)
        if key in made:
            first, view = made[key]
            views.append(view.moved((layer - first) * apart))
        else:
            views.append(_ready(run, stored[layer], attention, mod, dtype))
            made[key] = layer, views[-1]
    return views


def _ready(run: Run, cached: Tensor, attention: Attention, mod: ScoreMod, dtype: torch.dtype) -> NativeAttention:
    """One layer's cache (2, S, G, T, D)."""
    keys, values = cached.unbind(0)
    segments, place = [PlainSegment(keys, values)], run.newest
    if run.padding is not None:  # prompts end before the first new token
        prompt = run.padding.mask.shape[1]
        halves = [t.split((prompt, t.shape[2] - prompt), 2) for t in (keys, values)]
        segments, place = [PlainSegment(k, v) for k, v in zip(*halves, strict=True)], place - prompt
    shape = (keys.shape[0], attention.heads, attention.head_dim)
    ready = prepared(shape, dtype, segments, run.padding, attention.scale, mod=mod, place=place)
    assert ready is not None, "a plain cache in host memory is what the kernel reads"
    return ready
