"""Rotary positions (Su et al. 2021) and the ways in which their frequencies are scaled for longer texts.

In float32, in the order of operations of transformers 5 (``modeling_rope_utils``), so that angles agree to the last
places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Scaling = Mapping[str, Any]
_ORIGINAL = "original_max_position_embeddings"


def rotary_table(
    positions: Tensor,
    lengths: Tensor,
    head_dim: int,
    theta: float,
    scaling: Scaling | None,
    dtype: torch.dtype,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """cos and sin (N, 1, head_dim) of the angles of tokens at ``positions`` (N,). head_dim: how many values of a head
    are rotated;
    interleaved: in pairs of neighbours.

    lengths: (N,) how many tokens their sequences had when they were computed: those of the whole prompt for its
    tokens, one more than its position for a later one. Only ``dynamic`` and ``longrope`` look at them: a key keeps the
    rotation that it got, as in transformers. scaling: None, or ``rope_type`` with its numbers.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    exponents = exponents / head_dim
    inverse, factor = 1.0 / (theta**exponents), 1.0
    if scaling is not None:
        inverse, factor = _KINDS[scaling["rope_type"]](scaling, theta, exponents, lengths)
    angles = positions.float()[:, None] * inverse  # of (D / 2,), or (N, D / 2)
    if interleaved:
        angles = angles.repeat_interleave(2, dim=-1)[:, None, :]
    else:
        angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first R values of each head by the angles, in pairs of a value of the first half and one of the
    second, or of neighbours (interleaved): x (N, H, D), cos and sin (N, 1, R), R at most D."""
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        rotated = rotate(x[..., :dim], cos, sin, interleaved)
        return torch.cat((rotated, x[..., dim:]), dim=-1)
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos + turned * sin
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((-second, first), dim=-1), sin)


def _linear(scaling: Scaling, theta: float, exponents: Tensor, lengths: Tensor) -> tuple[Tensor, float]:
    """Positions divided (kaiokendev 2023)."""
    return 1.0 / (theta**exponents) / float(scaling["factor"]), 1.0


def _dynamic(scaling: Scaling, theta: float, exponents: Tensor, lengths: Tensor) -> tuple[Tensor, float]:
    """The base grows with the length beyond the original one (NTK-aware, "bloc97" and "emozilla" 2023)."""
    factor, original, dim = float(scaling["factor"]), scaling[_ORIGINAL], 2 * exponents.shape[0]
    grown = theta * ((factor * lengths / original) - (factor - 1)) ** (dim / (dim - 2))
    base = torch.where(lengths > original, grown, torch.full_like(grown, theta))
    return 1.0 / (base[:, None] ** exponents), 1.0


def _yarn(scaling: Scaling, theta: float, exponents: Tensor, lengths: Tensor) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, sections 3.2 and 3.4): slow frequencies divided, fast ones kept, a ramp between; and a
    temperature."""
    factor, original, dim = float(scaling["factor"]), scaling[_ORIGINAL], 2 * exponents.shape[0]

    def turns(count: float) -> float:
        """The dimension whose wave turns so often within the original length."""
        return dim * math.log(original / (count * 2 * math.pi)) / (2 * math.log(theta))

    low = turns(scaling.get("beta_fast") or 32)
    high = turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    places = torch.arange(dim // 2, dtype=torch.float32, device=exponents.device)
    kept = 1 - ((places - low) / (high - low)).clamp(0, 1)
    frequencies = theta**exponents
    inverse = 1.0 / (factor * frequencies) * (1 - kept) + 1.0 / frequencies * kept
    return inverse, _yarn_temperature(scaling, factor)


def _yarn_temperature(scaling: Scaling, factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def scale(times: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * times * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return scale(scaling["mscale"]) / scale(scaling["mscale_all_dim"])
    return scale(1)


def _longrope(scaling: Scaling, theta: float, exponents: Tensor, lengths: Tensor) -> tuple[Tensor, float]:
    """LongRoPE (Ding et al. 2024): a factor of its own for each frequency, other ones beyond the original length."""
    original, factor = scaling[_ORIGINAL], float(scaling["factor"])
    inverse = [
        1.0 / (torch.tensor(scaling[key], dtype=torch.float32, device=exponents.device) * theta**exponents)
        for key in ("long_factor", "short_factor")
    ]
    chosen = torch.where((lengths > original)[:, None], inverse[0], inverse[1])
    if scaling.get("attention_factor") is not None:
        return chosen, float(scaling["attention_factor"])
    return chosen, 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _llama3(scaling: Scaling, theta: float, exponents: Tensor, lengths: Tensor) -> tuple[Tensor, float]:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, a smooth ramp between."""
    inverse, factor = 1.0 / (theta**exponents), float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    wavelength = 2 * math.pi / inverse
    ramp = ((float(scaling[_ORIGINAL]) / wavelength - low) / (high - low)).clamp(0, 1)
    return inverse / factor * (1 - ramp) + inverse * ramp, 1.0


_KINDS: Mapping[str, Callable[[Scaling, float, Tensor, Tensor], tuple[Tensor, float]]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
