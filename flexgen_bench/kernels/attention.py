"""Attention over fresh keys (prefill) and over a cache in several segments (decode).

S sequences, N flattened tokens, H query heads, G KV heads, D head dim, T cached tokens.
Scores are dot products times ``scale``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float
) -> Tensor:
    """Causal attention of each sequence over itself.

    q (N, H, D), k and v (N, G, D), sequences one after the other with the given lengths; returns (N, H * D).
    Neighbours of equal length share a call; different lengths never see each other, so nothing is padded.
    """
    outputs = []
    grouped = q.shape[1] != k.shape[1]
    row = 0
    for length, count in _runs(lengths):
        stop = row + length * count
        queries, keys, values = (
            x[row:stop].view(count, length, x.shape[1], x.shape[2]).transpose(1, 2)
            for x in (q, k, v)
        )
        out = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=grouped
        )
        outputs.append(out.transpose(1, 2).reshape(stop - row, -1))
        row = stop
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def decode_attention(
    q: Tensor,
    segments: Sequence[tuple[Tensor, Tensor]],
    prompt_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """One query token per sequence over a cache that lies in several segments.

    q (S, H, D); each segment is (k, v) of shape (S, G, T_i, D). prompt_mask (S, T_0), True where the first
    segment holds a real token, or None if all do. Returns (S, H * D). Query heads that share a KV head are
    folded into the rows of one matrix product, so every key is read once.
    """
    sequences, heads, dim = q.shape
    groups = segments[0][0].shape[1]
    folded = q.reshape(sequences * groups, heads // groups, dim)
    scores = [
        torch.bmm(folded, k.reshape(sequences * groups, -1, dim).transpose(1, 2)).float()
        for k, _ in segments
    ]
    if prompt_mask is not None:
        first = scores[0].view(sequences, groups, heads // groups, -1)
        first.masked_fill_(~prompt_mask[:, None, None, :], float("-inf"))
    joined = torch.cat(scores, dim=-1) if len(scores) > 1 else scores[0]
    weights = torch.softmax(joined.mul_(scale), dim=-1).to(q.dtype)
    pieces = torch.split(weights, [k.shape[2] for k, _ in segments], dim=-1)
    out = torch.bmm(pieces[0], segments[0][1].reshape(sequences * groups, -1, dim))
    for piece, (_, v) in zip(pieces[1:], segments[1:], strict=True):
        out += torch.bmm(piece, v.reshape(sequences * groups, -1, dim))
    return out.reshape(sequences, heads * dim)


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring equal lengths: [5, 5, 3] -> [(5, 2), (3, 1)]."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs
