"""Mixtures of experts: which experts a token goes to, and through them. N tokens, E experts, k of them per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    top_k: int,
    *,
    sigmoid: bool,
    renormalised: bool,
    scale: float,
    groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor]:
    """x (N, hidden) and a router (E, hidden) -> numbers of each token's experts and what they weigh in float32, both
    (N, k). See ``models.parts.Router``; all of it is computed in float32, since a choice between near scores is
    otherwise a matter of rounding."""
    logits = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    judged = scores if correction is None else scores + correction.float()
    if groups > 1:
        judged = _best_groups(judged, groups, top_groups)
    chosen = judged.topk(top_k, -1).indices
    shares = scores.gather(1, chosen)
    if renormalised:
        shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)  # none may have a share, of sigmoids
    return chosen, shares * scale if scale != 1.0 else shares


def _best_groups(scores: Tensor, groups: int, top_groups: int) -> Tensor:
    """Scores (N, E), of which those outside of each token's best groups are minus infinity (DeepSeek-V3, section
    2.1.2: a group is worth its two best experts)."""
    by_group = scores.view(scores.shape[0], groups, -1)
    worth = by_group.topk(2, -1).values.sum(-1)
    out = torch.ones_like(worth, dtype=torch.bool)
    out.scatter_(1, worth.topk(top_groups, -1).indices, False)
    return by_group.masked_fill(out.unsqueeze(-1), float("-inf")).view_as(scores)


def through_experts(x: Tensor, chosen: Tensor, shares: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """x (N, hidden) through the experts of each token, chosen (N, k), weighed with shares (N, k), and summed in the
    order of the experts: one call of each that any token has chosen, with all of its tokens.

    No expert twice for a token, so that sums come out the same every time, in any company. Waits for the device: what
    is called depends on what was chosen."""
    flat = chosen.flatten()
    order = flat.sort(stable=True).indices
    counts = torch.bincount(flat, minlength=len(experts)).tolist()
    tokens, weights = order // chosen.shape[1], shares.flatten()[order].unsqueeze(1)
    out, first = torch.zeros_like(x), 0
    for expert, count in zip(experts, counts, strict=True):
        if count:
            rows = tokens[first : first + count]
            made = expert(x[rows]) * weights[first : first + count]
            out.index_add_(0, rows, made.to(out.dtype))
            first += count
    return out
