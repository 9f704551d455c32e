"""Attention over fresh keys (prefill), over part of a prompt (chunks) and over a cache in several segments (decode).

S sequences, H query heads, G KV heads, D head dim, T cached tokens. Scores are dot products times ``scale``,
changed as a ScoreMod says.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flexgen_bench.core.score_mod import NO_MOD, ScoreMod
from flexgen_bench.kernels.decode import attend_with_torch
from flexgen_bench.kernels.decode_native import attend_natively
from flexgen_bench.kernels.prefill import chunk_attention, prefill_attention
from flexgen_bench.kernels.segments import PackedSegment, Padding, PlainSegment, Segment

__all__ = [
    "PackedSegment",
    "Padding",
    "PlainSegment",
    "Segment",
    "chunk_attention",
    "decode_attention",
    "prefill_attention",
]


def decode_attention(
    q: Tensor,
    segments: Sequence[Segment],
    padding: Padding | None,
    scale: float,
    value_share: float = 1.0,
    slots: Sequence[int] | None = None,
    mod: ScoreMod = NO_MOD,
    sinks: Tensor | None = None,
    newest: Sequence[int] | None = None,
) -> Tensor:
    """One query token per sequence over a cache that lies in several segments, one after the other in time; without
    distances in ``mod`` in any order.

    q (S', H, D); returns (S', H * D). slots: which of the segments' sequences q's rows belong to, S' of them in
    ascending order (None: all S of them); the others are not read. padding: which slots of the first segment hold a
    token (None: all). value_share below 1: of each head, the value row of the last token is used and those with the
    largest weights, together max(1, ceil(value_share * tokens)) of them, with the weights that they have among all
    tokens (that are in the window). mod: how scores change before the softmax. sinks (H,) float32: see
    ``score_mod.softmax``. newest: of each of q's rows, which slot, counted through all segments, holds the last token
    (None: the last one).
    Softmax in float32. A sequence's result depends on no other one.
    """
    attended = attend_natively(q, segments, padding, scale, value_share, slots, mod, sinks, newest)
    if attended is None:
        attended = attend_with_torch(q, segments, padding, scale, value_share, slots, mod, sinks, newest)
    return attended
