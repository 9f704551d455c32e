"""Quantizing to GGUF's types of super-blocks, Q4_K, Q5_K and Q6_K: what ``gguf.quants`` reads but does not write.

A super-block is 256 values of a row; its groups (32 values, or 16 in Q6_K) have scales that are themselves quantized,
by one float16 for all of them. What makes these types what they are is how a group's scale is searched; this follows
llama.cpp's ``quantize_row_q4_K_ref``, ``_q5_K_ref`` and ``_q6_K_ref`` (ggml/src/ggml-quants.c, without an importance
matrix) in float32 and in their order of additions, so that the bytes are the same. Of a group whose scale rounds to
nothing the codes mean nothing; here they are 0.

Arrays are (values of a group, groups): a sum over the first axis adds one value after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

SUPER_BLOCK = 256
# A group of smaller values is zero.
_NOTHING = np.float32(1e-15)
_SCALE_LEVELS = np.float32(63)  # six bits, of the scales and smallest values of Q4_K and Q5_K


@dataclass(frozen=True)
class _Search:
    """Of an affine group: codes 0 to ``levels``; the scales tried are those that spread a group over first, first +
    0.1, ... more levels, ``steps`` times further."""

    levels: int
    first: float
    steps: int


_Q4, _Q5 = _Search(15, -1.0, 20), _Search(31, -0.5, 15)


def quantize_blocks(values: Floats, name: str) -> Bytes:
    """values: float32 (B, 256) super-blocks. name: Q4_K, Q5_K or Q6_K. Returns their bytes (B, bytes of a block)."""
    with np.errstate(all="ignore"):
        return _BLOCKS[name](values)


def _affine_blocks(values: Floats, search: _Search) -> Bytes:
    """Blocks of 8 groups of 32, value = scale * code - low: Q4_K (4 bits), Q5_K (the fifth bits apart)."""
    count = len(values)
    groups = np.ascontiguousarray(values.reshape(-1, 32).T)
    scales, lows = (x.reshape(count, 8) for x in _affine_groups(groups, search))
    scale_codes, of_scales = _six_bits(scales)
    low_codes, of_lows = _six_bits(lows)
    step = (of_scales.astype(np.float32) * scale_codes).reshape(-1)
    low = (of_lows.astype(np.float32) * low_codes).reshape(-1)
    codes = np.clip(np.rint((groups + low) / step), 0, search.levels)
    packed = np.where(step == 0, 0, codes).astype(np.uint8).T.reshape(count, 4, 2, 32)
    high: tuple[Bytes, ...] = ()
    if search.levels > 15:  # bit g of byte j: of value j of group g
        fifth = (packed.reshape(count, 8, 32) >> 4) << np.arange(8, dtype=np.uint8)[None, :, None]
        high = (np.bitwise_or.reduce(fifth, axis=1),)
    nibbles = (packed[:, :, 0] & 15) | ((packed[:, :, 1] & 15) << 4)
    params = (_as_bytes(of_scales), _as_bytes(of_lows), _packed_scales(scale_codes, low_codes))
    return np.concatenate([*params, *high, nibbles.reshape(count, 128)], axis=1)


def _affine_groups(x: Floats, search: _Search) -> tuple[Floats, Floats]:
    """Scale and negated smallest value (N,) of each group (32, N) of least squared error, large values counting more.

    Rounding with a trial scale gives codes, and a regression on these the scale and smallest value that fit them best;
    the best of all trials is kept, and the next trials begin at its smallest value.
    """
    weight = np.sqrt((x * x).sum(axis=0) / np.float32(32)) + np.abs(x)
    low, high = np.minimum(x.min(axis=0), np.float32(0)), x.max(axis=0)
    flat = high == low
    sum_w, sum_x = weight.sum(axis=0), (weight * x).sum(axis=0)
    levels = np.float32(search.levels)
    inverse = levels / (high - low)
    scale = np.float32(1) / inverse
    error = _error(x, weight, _codes(x, low, inverse, levels), scale, low)
    for step in range(search.steps + 1):
        spread = np.float32(search.first) + np.float32(0.1) * np.float32(step) + levels
        codes = _codes(x, low, spread / (high - low), levels)
        weighted = weight * codes
        sum_l, sum_l2, sum_xl = weighted.sum(axis=0), (weighted * codes).sum(axis=0), (weighted * x).sum(axis=0)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        above = new_low > 0
        new_scale, new_low = np.where(above, sum_xl / sum_l2, new_scale), np.where(above, np.float32(0), new_low)
        new_error = _error(x, weight, codes, new_scale, new_low)
        better = (determinant > 0) & (new_error < error)
        scale, low, error = (
            np.where(better, new, old) for new, old in ((new_scale, scale), (new_low, low), (new_error, error))
        )
    return np.where(flat, np.float32(0), scale), -low


def _codes(x: Floats, low: Floats, inverse: Floats, levels: np.float32) -> Floats:
    return np.clip(np.rint(inverse * (x - low)), np.float32(0), levels)


def _error(x: Floats, weight: Floats, codes: Floats, scale: Floats, low: Floats) -> Any:
    change = scale * codes + low - x
    return (weight * (change * change)).sum(axis=0)


def _six_bits(values: Floats) -> tuple[Bytes, NDArray[np.float16]]:
    """values: (B, 8). Their codes (B, 8) and each row's step (B, 1)."""
    most = np.maximum(values.max(axis=1, keepdims=True), np.float32(0))
    inverse = np.where(most > 0, _SCALE_LEVELS / most, np.float32(0))
    codes = np.rint(inverse * values).astype(np.int32).astype(np.uint8)
    return np.minimum(codes, np.uint8(63)), (most / _SCALE_LEVELS).astype(np.float16)


def _packed_scales(scales: Bytes, lows: Bytes) -> Bytes:
    """Two times eight codes of six bits in 12 bytes: the first four of each whole, with the upper two bits of the last
    four above them; then the lower four bits of these."""
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = lows[:, :4] | ((lows[:, 4:] >> 4) << 6)
    return np.concatenate([first, second, (scales[:, 4:] & 15) | ((lows[:, 4:] & 15) << 4)], axis=1)


def _q6_blocks(values: Floats) -> Bytes:
    """Blocks of 16 groups of 16, value = scale * (code - 32), scales of eight bits."""
    count = len(values)
    groups = np.ascontiguousarray(values.reshape(-1, 16).T)
    scales = _symmetric_groups(groups).reshape(count, 16)
    largest = np.take_along_axis(scales, np.abs(scales).argmax(axis=1)[:, None], axis=1)
    zero = np.abs(largest) < _NOTHING
    inverse = np.float32(-128) / largest
    step = np.where(zero, np.float32(0), np.float32(1) / inverse).astype(np.float16)
    scale_codes = np.where(zero, 0, np.minimum(np.rint(inverse * scales), 127)).astype(np.int8)
    size = (step.astype(np.float32) * scale_codes).reshape(-1)
    codes = np.clip(np.rint(groups / size), -32, 31) + 32
    codes = np.where(size == 0, 32, codes).astype(np.uint8).T.reshape(count, 256)
    codes[zero[:, 0]] = 0
    halves = codes.reshape(count, 2, 4, 32)
    lower = (halves[:, :, :2] & 15) | ((halves[:, :, 2:] & 15) << 4)
    shifted = (halves >> 4) << np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    upper = np.bitwise_or.reduce(shifted, axis=2)
    parts = (lower.reshape(count, 128), upper.reshape(count, 64), scale_codes.view(np.uint8), _as_bytes(step))
    return np.concatenate(parts, axis=1)


def _symmetric_groups(x: Floats) -> Floats:
    """The scale (N,) of each group (16, N) for codes -32 to 31, of least squared error relative to the values' own
    size. The largest value gets the code of the longer side; 18 scales around that one are tried."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    zero = np.abs(largest) < _NOTHING
    weight = x * x
    best = scale = np.zeros(x.shape[1], np.float32)
    for trial in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(np.float32(32) + np.float32(0.1) * np.float32(trial)) / largest
        codes = np.clip(np.rint(inverse * x), np.float32(-32), np.float32(31))
        sum_lx, sum_l2 = (weight * x * codes).sum(axis=0), (weight * codes * codes).sum(axis=0)
        fits = sum_l2 > 0
        better = fits if trial == 0 else fits & (sum_lx * sum_lx > best * sum_l2)
        scale = np.where(better, sum_lx / sum_l2, scale)
        best = np.where(better, scale * sum_lx, best)
    return np.where(zero, np.float32(0), scale)


def _as_bytes(halves: NDArray[np.float16]) -> Bytes:
    return np.ascontiguousarray(halves).view(np.uint8)


_BLOCKS: Mapping[str, Callable[[Floats], Bytes]] = {
    "Q4_K": lambda values: _affine_blocks(values, _Q4),
    "Q5_K": lambda values: _affine_blocks(values, _Q5),
    "Q6_K": _q6_blocks,
}
