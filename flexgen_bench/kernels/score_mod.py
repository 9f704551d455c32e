"""Attention whose scores are changed before the softmax (core/score_mod.py), or whose softmax has sinks, with torch's
operators.

C sequences, L queries and T keys of each, H query heads, G KV heads, D head dim. Positions are of tokens in their
sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from flexgen_bench.core.score_mod import SCORES_AT_ONCE, ScoreMod


@dataclass(frozen=True)
class Tree:
    """Tokens that do not simply follow each other: positions of queries (L,) and keys (T,), and which query sees which
    key (L, T) bool."""

    queries: Tensor
    keys: Tensor
    seen: Tensor


def modified(scores: Tensor, distances: Tensor, mod: ScoreMod) -> Tensor:
    """scores (..., H, L, T) float32, scaled -> the same changed, in place. distances (..., 1, L, T): of each key behind
    its query; what is ahead of it (below 0) is not seen."""
    if mod.soft_cap is not None:
        scores.div_(mod.soft_cap).tanh_().mul_(mod.soft_cap)
    if mod.slopes:
        slopes = slopes_of(mod.slopes, scores.device)
        scores.addcmul_(slopes[:, None, None], distances.to(torch.float32), value=-1)
    return scores.masked_fill_(~visible(distances, mod), float("-inf"))


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """scores (..., H, L, T) -> weights of the keys, float32; with sinks no contiguous tensor.

    sinks (H,) float32: of each head, a score of nothing. It takes part in what exponentials are divided by, so that a
    head may look at nothing; Xiao et al. 2024, in gpt-oss's form: learned, without a key or a value.
    """
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32)
    column = sinks[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores.float(), column), dim=-1).softmax(-1)[..., :-1]


def visible(distances: Tensor, mod: ScoreMod) -> Tensor:
    """Where a query sees a key."""
    seen = distances >= 0
    return seen if mod.window is None else seen & (distances < mod.window)


def modified_attention(
    q: Tensor, k: Tensor, v: Tensor, mod: ScoreMod, scale: float, tree: Tree | None = None, sinks: Tensor | None = None
) -> Tensor:
    """q (C, L, H, D), k and v (C, G, T, D) -> (C, L, H * D).

    The queries are the last L of T tokens that follow each other; or of a ``tree``. Few of them at a time, so that
    scores stay small.
    """
    count, length, heads, dim = q.shape
    groups, tokens = k.shape[1], k.shape[2]
    positions = torch.arange(tokens, device=q.device) if tree is None else tree.keys
    queries = positions[tokens - length :] if tree is None else tree.queries
    rows = max(1, SCORES_AT_ONCE // (count * heads * tokens))
    out = q.new_empty(count, length, heads * dim)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        low, high = 0, tokens
        if tree is None:  # what has left the windows of all these queries, and what is ahead of them
            high = tokens - length + stop
            low = max(0, tokens - length + start + 1 - (mod.window or high))
        distances = queries[start:stop, None] - positions[None, low:high]
        mask = visible(distances, mod)
        if tree is not None:
            mask &= tree.seen[start:stop]
        some = q[:, start:stop].transpose(1, 2)
        keys, values = k[:, :, low:high], v[:, :, low:high]
        if mod.soft_cap is None and not mod.slopes and sinks is None:
            attended = _masked(some, keys, values, mask, scale)
        else:
            folded = some.reshape(count, groups, heads // groups * (stop - start), dim)
            scores = torch.matmul(folded * scale, keys.transpose(2, 3)).float()
            scores = modified(scores.view(count, heads, stop - start, -1), distances, mod)
            if tree is not None:
                scores.masked_fill_(~mask, float("-inf"))
            weights = softmax(scores, sinks).to(q.dtype).view(count, groups, -1, scores.shape[-1])
            attended = torch.matmul(weights, values).view(count, heads, stop - start, dim)
        out[:, start:stop] = attended.transpose(1, 2).reshape(count, stop - start, heads * dim)
    return out


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q (C, H, L, D) -> the same shape."""
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda:  # only the flash kernel takes grouped heads there, and it takes no mask
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


@lru_cache(maxsize=64)
def slopes_of(slopes: tuple[float, ...], device: torch.device) -> Tensor:
    """(H,) float32. Kept: every layer asks for them."""
    return torch.tensor(slopes, dtype=torch.float32, device=device)
