"""Attention of prompts: whole ones over themselves, and chunks of them over what came before.

S sequences, N flattened tokens, H query heads, G KV heads, D head dim, P slots for a prompt's tokens. Scores are dot
products times ``scale``, changed as a ScoreMod says. sinks (H,) float32: see ``score_mod.softmax``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from flexgen_bench.core.score_mod import NO_MOD, ScoreMod
from flexgen_bench.kernels.score_mod import modified_attention

Item = TypeVar("Item")


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scale: float,
    mod: ScoreMod = NO_MOD,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence over itself.

    q (N, H, D), k and v (N, G, D), sequences one after the other with the given lengths; returns (N, H * D).
    Neighbours of equal length share a call; different lengths never see each other, so nothing is padded.
    """
    outputs = []
    row = 0
    for length, count in _runs(lengths):
        stop = row + length * count
        keys, values = (x[row:stop].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (k, v))
        outputs.append(_causal(q[row:stop], keys, values, scale, mod, sinks))
        row = stop
    return _joined(outputs, q)


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Sequence[tuple[int, int]],
    scale: float,
    mod: ScoreMod = NO_MOD,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of a chunk of each prompt over that prompt's tokens so far.

    q (N, H, D): of each sequence s the tokens from ranges[s][0] to below ranges[s][1] (none if they are equal), one
    sequence after the other. k and v (S, G, P, D) hold at least the tokens below ranges[s][1]; token t attends to
    tokens 0 to t.
    Returns (N, H * D). Neighbours with equal ranges share a call.
    """
    outputs = []
    row = sequence = 0
    for (start, stop), count in _runs(ranges):
        rows = row + (stop - start) * count
        if stop > start:
            keys, values = (x[sequence : sequence + count, :, :stop] for x in (k, v))
            outputs.append(_causal(q[row:rows], keys, values, scale, mod, sinks))
        row, sequence = rows, sequence + count
    return _joined(outputs, q)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, mod: ScoreMod, sinks: Tensor | None) -> Tensor:
    """q (C * L, H, D), the last L tokens of C sequences; k, v (C, G, T, D), T >= L. Returns (C * L, H * D)."""
    count, _, tokens, _ = k.shape
    rows, heads, dim = q.shape
    length = rows // count
    mod = mod.over(tokens)
    if not mod.is_none or sinks is not None:
        out = modified_attention(q.reshape(count, length, heads, dim), k, v, mod, scale, sinks=sinks)
        return out.view(rows, heads * dim)
    queries = q.view(count, length, heads, dim).transpose(1, 2)
    grouped = heads != k.shape[1]
    mask = None
    if length < tokens:  # aligned to the lower right: the last query sees every key
        mask = torch.ones(length, tokens, dtype=torch.bool, device=q.device).tril_(tokens - length)
    if grouped and q.is_cuda and (mask is not None or torch.cuda.get_device_capability()[0] < 8):
        # On CUDA only the flash kernel takes grouped heads: no mask, Ampere or newer. The others would hold all scores
        # at once; keys and values for every query head are far smaller.
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    out = F.scaled_dot_product_attention(
        queries, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).reshape(rows, heads * dim)


def _joined(outputs: Sequence[Tensor], q: Tensor) -> Tensor:
    if not outputs:
        return q.new_empty(0, q.shape[1] * q.shape[2])
    return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs))


def _runs(items: Sequence[Item]) -> Iterator[tuple[Item, int]]:
    """Neighbouring equal items: [5, 5, 3] -> (5, 2), (3, 1)."""
    for item, group in groupby(items):
        yield item, len(list(group))
