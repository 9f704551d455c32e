"""Codes of a few bits in 32-bit words."""

from __future__ import annotations

import torch
from torch import Tensor


def unpacked(words: Tensor, bits: int, axis: int) -> Tensor:
    """int32 words -> int32 codes from 0 to 2^bits - 1: each word holds ``32 // bits``, the lowest bits first, along
    ``axis``."""
    words = words.to(torch.int32)
    axis %= words.ndim
    places = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32)
    spread = [1] * (words.ndim + 1)
    spread[axis + 1] = -1
    # The shift of a negative word brings in ones from the left; the mask takes them away.
    codes = (words.unsqueeze(axis + 1) >> places.view(spread)) & ((1 << bits) - 1)
    return codes.flatten(axis, axis + 1)


def words_for(count: int, bits: int) -> int:
    """How many words hold so many codes."""
    return -(-count // (32 // bits))
