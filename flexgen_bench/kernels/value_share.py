"""Sparse attention on V: only the value rows with the largest weights are used (FlexGen, section 5).

The weights are those of the softmax over all keys and are not scaled up for what is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def kept(value_share: float, tokens: int) -> int:
    """How many value rows of a sequence with ``tokens`` tokens are used."""
    return max(1, math.ceil(value_share * tokens))


def drop_small(weights: Tensor, last: Sequence[int], keep: Sequence[int]) -> Tensor:
    """weights (S, R, T) float32 in 0..1, R rows of each sequence -> the same with all but some set to 0, in place.

    Of each row of sequence s its weight at last[s] (the last token) and the keep[s] - 1 largest others stay; among
    equal ones those of earlier tokens.
    """
    sequences, _, tokens = weights.shape
    # Bits of floats that are not negative are ordered as the floats are. With the index below them no two keys are
    # equal, so that which of equal weights stay is defined, on every device.
    index = torch.arange(tokens, device=weights.device)
    order = (weights.view(torch.int32).long() << 32) - index
    latest = _beside(weights, last)[:, None, None].expand(-1, order.shape[1], 1)
    order.scatter_(2, latest, torch.iinfo(torch.int64).max)
    top = order.topk(max(keep), dim=2).indices
    rank = torch.arange(max(keep), device=weights.device)
    used = rank < _beside(weights, keep)[:, None]
    stays = torch.zeros_like(weights, dtype=torch.bool)
    stays.scatter_(2, top, used[:, None].expand(sequences, order.shape[1], -1))
    return weights.masked_fill_(~stays, 0)


def _beside(weights: Tensor, numbers: Sequence[int]) -> Tensor:
    """Numbers where the weights are. From pinned memory: a GPU's stream would be waited for otherwise."""
    host_numbers = torch.tensor(numbers)
    return host_numbers.pin_memory().to(weights.device, non_blocking=True) if weights.is_cuda else host_numbers
