"""Random weights of sane scale for a shape whose trained ones are not at hand: throughput only."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flexgen_bench.checkpoints.quantized.packed_names import BLOCKS, SCALES
from flexgen_bench.core.microscaling import EXPONENT_BIAS, MXFP4
from flexgen_bench.core.model import DType
from flexgen_bench.core.units import GB

if TYPE_CHECKING:
    import torch

# Values generated at a time, so that a large matrix is never held in float32.
_CHUNK = 2**22
_CODES_STD = 2.9  # of random codes of MXFP4
_STD = 0.02  # the standard deviation OPT and Llama are initialised with
# From this size on every layer has the numbers of the first one, and the checkpoint holds them once: OPT-175B takes 5
# GB of disk instead of 350. Speed does not depend on the values, and whoever loads it still needs memory for every
# layer.
REPEATED_FROM_BYTES = 10 * GB
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
# Projections that add to the residual stream: scaled down so that its size does not grow with depth
# (Radford et al. 2019, section 2.3).
_RESIDUAL = (
    "out_proj.weight",
    "fc2.weight",
    "o_proj.weight",
    "down_proj.weight",
    ".w2.weight",
    "dense.weight",
    "dense_4h_to_h.weight",
    "fc_out.weight",
    "experts.down_proj",
    f"experts.down_proj{SCALES}",
)
_NORM = re.compile(r"(norm|\.ln_1|\.ln_f)\.weight$")


def dummy_tensor(name: str, shape: tuple[int, ...], dtype: DType, num_layers: int, seed: int) -> torch.Tensor:
    """The tensor ``name``: the same for the same name, shape and seed, whatever is made before it.

    Norm weights lie around 1; biases are small and not zero. Matrices narrower than 2,500 inputs get the
    standard deviation 1/sqrt(inputs) instead of 0.02, so that small models are not all but linear.
    """
    import torch

    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if name.endswith(BLOCKS):
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    if name.endswith(SCALES):
        _, std = _scale(name, (*shape[:-1], shape[-1] * MXFP4.group_size), num_layers)
        return torch.full(shape, EXPONENT_BIAS + round(math.log2(std / _CODES_STD)), dtype=torch.uint8)
    mean, std = _scale(name, shape, num_layers)
    tensor = torch.empty(shape, dtype=getattr(torch, dtype.value))
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        part.copy_(torch.randn(part.numel(), generator=generator).mul_(std).add_(mean))
    return tensor


def _scale(name: str, shape: tuple[int, ...], num_layers: int) -> tuple[float, float]:
    if _NORM.search(name):
        return 1.0, _STD
    if len(shape) < 2 or "embed" in name or name == "lm_head.weight":
        return 0.0, _STD
    std = max(_STD, 1 / math.sqrt(shape[-1]))
    return 0.0, std / math.sqrt(2 * num_layers) if name.endswith(_RESIDUAL) else std


def firsts(expected: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """For each tensor, that of the first layer with one of this name and shape: ``decoder.layers.7.fc1.bias`` ->
    ``decoder.layers.0.fc1.bias``."""
    first: dict[tuple[str, tuple[int, ...]], str] = {}
    return {name: first.setdefault((_LAYER.sub("*", name, count=1), shape), name) for name, shape in expected.items()}
