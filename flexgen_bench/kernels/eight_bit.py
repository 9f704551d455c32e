"""Products of 4-bit weights with activations in 8 bits: what ``policy.lossy.activations`` asks for, with torch's
operators.

Every group of a row of x, as long as the weight's groups, gets a scale, its largest magnitude / 127, and codes -127 ..
127, rounded to nearest. The native kernel (native/code_products.h) multiplies codes with codes in whole numbers; here
both are unpacked and multiplied in float32, which differs by rounding alone. Unlike in other products the weight's
values are not rounded to its type.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flexgen_bench.kernels.quantization import QuantizedWeight

LEVELS = 127
# Groups that have nothing larger become zeros: dividing by less would leave float32's range.
SMALLEST = 1e-30
TILE_BYTES = 8 << 20


def in_eighths(x: Tensor, group_size: int) -> Tensor:
    """What is left of x (N, in) in 8 bits: float32. Groups with a value that is not finite become NaN."""
    n = x.shape[1]
    groups = F.pad(x.float(), (0, -n % group_size)).unflatten(1, (-1, group_size))
    largest = groups.abs().amax(dim=-1, keepdim=True)
    # A number / a tensor would be the tensor's reciprocal times the number, rounded twice.
    turns = torch.where(largest > SMALLEST, torch.full_like(largest, LEVELS) / largest, 0.0)
    rounded = (groups * turns).round() * (largest / LEVELS)
    rounded = torch.where(groups.isfinite().all(dim=-1, keepdim=True), rounded, torch.nan)
    return rounded.flatten(1)[:, :n]


def linear_in_eighths(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x (N, in), in 8 bits, times weight (out, in) transposed plus bias, rounded once to x's type."""
    outputs, inputs = weight.shape
    rounded = in_eighths(x, weight.compression.group_size)
    y = x.new_empty((x.shape[0], outputs))
    step = max(1, TILE_BYTES // (4 * inputs))
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        values = weight.rows(start, stop, dtype=torch.float32)
        part = None if bias is None else bias[start:stop].float()
        y[:, start:stop] = F.linear(rounded, values, part)
    return y
