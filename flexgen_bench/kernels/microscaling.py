"""MXFP4 as checkpoints hold it into the layout of kernels/quantization.py, and to numbers (core/microscaling.py).

Values are exact in float32 and bfloat16, as far as these reach; float16 rounds those below 2^-15.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from flexgen_bench.core.microscaling import E2M1, EXPONENT_BIAS, MXFP4


def repacked(blocks: Tensor) -> Tensor:
    """blocks (R, groups, 16) uint8, whose bytes hold neighbours, the first in the lower half -> codes (R, groups * 16):
    byte j of a group holds its values j and j + 16."""
    values = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    low, high = values.chunk(2, dim=-1)
    return (low | high << 4).flatten(-2)


def dequantize_with_torch(codes: Tensor, exponents: Tensor, out: Tensor) -> None:
    """The reference, on any device: codes (R, n / 2), exponents (R, groups) uint8 -> out (R, n) of any type."""
    table = _table(codes.device)
    grouped = codes.unflatten(1, (-1, MXFP4.group_size // 2))
    both = torch.cat((table[(grouped & 15).int()], table[(grouped >> 4).int()]), dim=-1)
    out.copy_(torch.ldexp(both, exponents.int().sub_(EXPONENT_BIAS)[..., None]).flatten(1))


@lru_cache(maxsize=8)
def _table(device: torch.device) -> Tensor:
    return torch.tensor(E2M1, device=device)
