"""Pure functions on tensors that model families are written with. N tokens, H heads, D head dim."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from flexgen_bench.core.errors import unknown_choice
from flexgen_bench.kernels.eight_bit import linear_in_eighths
from flexgen_bench.kernels.experts import route, through_experts
from flexgen_bench.kernels.fused_product import fused_product
from flexgen_bench.kernels.narrow_linear import (
    CPU_TILE_BYTES,
    DEVICE_TILE_BYTES,
    is_faster,
    narrow_linear,
    tiled_linear,
)
from flexgen_bench.kernels.output_groups import OutputQuantizedWeight
from flexgen_bench.kernels.quantization import QuantizedWeight
from flexgen_bench.kernels.rms_norm import rms_norm
from flexgen_bench.kernels.rotary import rotary_table, rotate

__all__ = [
    "activation",
    "clamped_gate",
    "layer_norm",
    "linear",
    "rms_norm",
    "rms_norm_around_one",
    "rotary_table",
    "rotate",
    "route",
    "scaled",
    "soft_capped",
    "through_experts",
]

# Without the native kernel, float32 products on a processor with so many rows are faster with the weight as the left
# operand: 68 against 47 GFLOP/s at 8 rows, 230 against 171 at 32, equal at 64 and at 4, half as fast at 2
# (benchmarks/small_products.py and quantized_products.py, docs/notes/cpu_products.md).
FEWEST_LEFT_ROWS, MOST_LEFT_ROWS = 5, 48
# Rows of x up to which groups along outputs are multiplied with as they lie: 19 against 13 ms at 128 rows in bfloat16
# (2048 x 2048),
# 16 against 22 in float32, 67 against 40 and 48 against 36 at 512.
MOST_STRIP_ROWS = 128


def linear(x: Tensor, weight: Tensor | QuantizedWeight | OutputQuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x (N, in) times weight (out, in) transposed, plus bias; a quantized weight has x's type."""
    if isinstance(weight, OutputQuantizedWeight):
        return _linear_along_outputs(x, weight, bias)
    if is_faster(x, weight):
        return narrow_linear(x, weight, bias)
    if isinstance(weight, QuantizedWeight):
        if weight.activations is not None:
            return linear_in_eighths(x, weight, bias)
        y = fused_product(x, weight, bias) if x.is_cuda else None
        return tiled_linear(x, weight, bias) if y is None else y
    on_processor = x.dtype is torch.float32 and x.device.type == "cpu"
    if on_processor and FEWEST_LEFT_ROWS <= x.shape[0] <= MOST_LEFT_ROWS:
        y = torch.mm(weight, x.t()).t().contiguous()
        return y if bias is None else y.add_(bias)
    return F.linear(x, weight, bias)


def _linear_along_outputs(x: Tensor, weight: OutputQuantizedWeight, bias: Tensor | None) -> Tensor:
    """Strip by strip as they lie, or for many rows unpacked into rows first: some at a time."""
    if x.shape[0] <= MOST_STRIP_ROWS:
        return weight.linear(x, bias)
    outputs, inputs = weight.shape
    room = CPU_TILE_BYTES if x.device.type == "cpu" else DEVICE_TILE_BYTES
    size = weight.compression.group_size
    step = max(1, room // (inputs * size * x.element_size())) * size
    y = x.new_empty((x.shape[0], outputs))
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        part = None if bias is None else bias[start:stop]
        y[:, start:stop] = linear(x, weight.rows(start, stop), part)
    return y


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation over the last dimension; without weight and bias it only normalises."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def rms_norm_around_one(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * (1 + weight), multiplied in float32 before it is rounded (Gemma)."""
    return F.rms_norm(x.float(), (x.shape[-1],), 1.0 + weight.float(), eps).to(x.dtype)


def scaled(x: Tensor, factor: float) -> Tensor:
    """x times a factor that is rounded to x's type first."""
    return x * float(torch.tensor(factor, dtype=x.dtype))


def soft_capped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap): no larger than the cap (Gemma 2, section 2)."""
    return torch.tanh(x / cap) * cap


def clamped_gate(both: Tensor, limit: float, alpha: float) -> Tensor:
    """both (N, 2 * width), gate and up in turn -> (N, width): see ``models.parts.Clamp``."""
    gate = both[:, ::2].clamp(max=limit)
    up = both[:, 1::2].clamp(-limit, limit).add_(1)
    return up.mul_(gate.mul_(torch.sigmoid(gate * alpha)))


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
}


def activation(name: str, x: Tensor) -> Tensor:
    """The named activation; UserError lists the known ones."""
    return activation_function(name)(x)


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name; UserError lists the known ones."""
    if name not in _ACTIVATIONS:
        raise unknown_choice("activation", name, _ACTIVATIONS)
    return _ACTIVATIONS[name]
