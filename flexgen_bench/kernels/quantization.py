"""Group-wise quantization of rows: codes and two float16 numbers per group, and the way back.

A group is a run of ``compression.group_size`` values along the last dimension; the last group of a row may be shorter.
Value of a code: ``smallest + code * scale``, computed in float32 and rounded once to the type that is asked for.
``code * scale`` is exact in float32 (8 times 11 bits), so every implementation gives the same bits.

Layout of a row of codes, ``compression.code_bytes(N)`` bytes: one group after the other, whole bytes each. Within a
group of m values (a short last one is filled up to a multiple of 8 with code 0) neighbouring bytes hold neighbouring
values, so that packing and unpacking are operations on contiguous vectors:

- 8 bits: byte j is value j.
- 4 bits: byte j holds value j (low half) and value j + m/2 (high half).
- 3 bits: three planes of e = m/8 bytes, p0, p1, p2. Byte j of a plane holds two values in its bits 0-2 and 3-5:
  p0 values j and j + e, p1 values j + 2e and j + 3e, p2 values j + 4e and j + 5e. Value j + 6e: bits 6-7 of p0, then
  bit 6 of p1. Value j + 7e: bits 6-7 of p2, then bit 7 of p1.

Layout of a row of parameters: (groups, 2) float16, each group's scale and smallest value.

What odd groups give: a constant group has scale 0 and every value is its value as float16 holds it (all-zero groups are
exactly zero). An outlier widens its group's steps and no other's. Values beyond float16's finite range (+-65504, from
float32 or bfloat16 tensors) saturate to it. NaN and infinities give unspecified codes for their group, without an
error: callers check (weights when a store is converted, the cache in the engine).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexgen_bench.core.compression import Compression, Scales
from flexgen_bench.core.microscaling import Codes, Microscaling
from flexgen_bench.kernels import microscaling
from flexgen_bench.kernels.native import matrices
from flexgen_bench.kernels.native.build import library
from flexgen_bench.kernels.scale_search import least_squares
from flexgen_bench.kernels.unpacking import unpacking_kernel

# Values per tile on a processor: 256 KiB of float32 temporaries stay in a core's L2 cache. Elsewhere tiles only bound
# memory.
TILE_VALUES, DEVICE_TILE_VALUES = 1 << 16, 1 << 24
FLOAT16_LARGEST = 65504.0
LIMITS = (-FLOAT16_LARGEST, FLOAT16_LARGEST)
# Values that the native kernel writes in some 100 microseconds: what makes another thread worthwhile.
THREAD_VALUES = 1 << 19


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix (out, in) whose rows are quantized; ``ops.linear`` takes it in place of a tensor.

    codes (out, compression.code_bytes(in)) uint8, params (out, groups, 2) float16, of MXFP4 (out, groups) uint8; dtype:
    what its values are rounded to.
    activations: bits that what it is multiplied with is quantized to (kernels/eight_bit.py); None: it is taken as it
    is.
    """

    codes: Tensor
    params: Tensor
    shape: tuple[int, int]
    compression: Codes
    dtype: torch.dtype
    activations: int | None = None

    @functools.cached_property
    def matrix(self) -> matrices.Matrix:
        """As native code sees it, made once: a product of one row is called a thousand times a second."""
        return matrices.quantized(self.codes, self.params, self.shape[1], self.compression, self.dtype)

    @staticmethod
    def of(weight: Tensor, compression: Compression) -> QuantizedWeight:
        """Quantize a matrix (out, in)."""
        outputs, inputs = weight.shape
        codes, params = quantize(weight, compression)
        return QuantizedWeight(codes, params, (outputs, inputs), compression, weight.dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """Output rows start to stop, dequantized: (stop - start, in)."""
        part = slice(start, stop)
        return dequantize(
            self.codes[part], self.params[part], self.shape[1], self.compression, dtype or self.dtype, out
        )

    def dequantize(self) -> Tensor:
        """The whole matrix (out, in)."""
        return self.rows(0, self.shape[0])


def quantize(x: Tensor, compression: Compression, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (..., N) -> codes (..., compression.code_bytes(N)) uint8 and params (..., groups, 2) float16.

    importance (N,) float32, above 0: how much squared errors count, with calibrated scales.

    Codes are the nearest to x that the stored (rounded) scale and smallest value allow. Temporaries: at most
    TILE_VALUES float32 values a few times over, whatever the size of x.
    """
    *lead, n = x.shape
    codes = x.new_empty((*lead, compression.code_bytes(n)), dtype=torch.uint8)
    params = x.new_empty((*lead, compression.groups(n), 2), dtype=torch.float16)
    if x.numel() == 0:
        return codes, params
    rows = codes.numel() // codes.shape[-1]
    flat_codes, flat_params = codes.view(rows, -1), params.view(rows, -1, 2)
    flat = x.reshape(rows, n)
    native = library("quantization") if _is_for_native(x, compression) else None
    if native is not None:
        flat = flat if flat.stride(1) == 1 else flat.contiguous()  # must outlive the call
        flat_matrix = matrices.plain(flat)
        packed = matrices.quantized(flat_codes, flat_params, n, compression, x.dtype)
        _in_threads(native.quantize, rows, n, ctypes.byref(flat_matrix), ctypes.byref(packed))
        return codes, params
    for part in _tiles(rows, n, x.device):
        for values, stored, group_params, width in _columns(
            flat[part], flat_codes[part], flat_params[part], compression
        ):
            groups = None
            if importance is not None:
                counted = values.shape[1] * width
                full = width == compression.group_size
                groups = (importance[:counted] if full else importance[-counted:]).view(-1, width)
            _quantize_groups(values, stored, group_params, width, compression, groups)
    return codes, params


def dequantize(
    codes: Tensor, params: Tensor, n: int, compression: Codes, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """codes (..., compression.code_bytes(n)) and params (..., groups, 2), of MXFP4 (..., groups) -> values (..., n) of
    ``dtype``.

    ``out`` (..., n) receives them if given; its strides are free, contiguous rows are fastest.
    """
    lead = codes.shape[:-1]
    if out is None:
        out = torch.empty((*lead, n), dtype=dtype, device=codes.device)
    assert out.shape == (*lead, n), (out.shape, lead, n)
    assert out.dtype == dtype, (out.dtype, dtype)
    assert codes.shape[-1] == compression.code_bytes(n), (codes.shape, n, compression)
    own = compression.groups(n), *(() if isinstance(compression, Microscaling) else (2,))
    assert params.shape == (*lead, *own), (params.shape, lead, n)
    if out.numel() == 0:
        return out
    rows = out.numel() // n
    flat_codes, flat_params = codes.reshape(rows, -1), params.reshape(rows, *own)
    if out.is_contiguous():
        _dequantize_rows(flat_codes, flat_params, out.view(rows, n), compression)
    else:
        values = torch.empty((rows, n), dtype=dtype, device=out.device)
        _dequantize_rows(flat_codes, flat_params, values, compression)
        out.copy_(values.view(out.shape))
    return out


def fake_quantize(x: Tensor, compression: Compression) -> Tensor:
    """What is left of x after quantizing and dequantizing, in x's shape and type."""
    codes, params = quantize(x, compression)
    return dequantize(codes, params, x.shape[-1], compression, x.dtype)


def _dequantize_rows(codes: Tensor, params: Tensor, out: Tensor, compression: Codes) -> None:
    """Matrices of rows, ``out`` contiguous: the fastest way that this device has."""
    kernel = unpacking_kernel(out.device, compression, out.dtype, dequantize_with_torch)
    if kernel is not None:
        kernel(codes, params, out, compression)
    elif out.device.type == "cpu" and (native := library("quantization")) is not None:
        rows, n = out.shape
        codes, params = codes.contiguous(), params.contiguous()
        matrix = matrices.quantized(codes, params, n, compression, out.dtype)
        _in_threads(native.dequantize, rows, n, ctypes.byref(matrix), ctypes.c_void_p(out.data_ptr()))
    else:
        dequantize_with_torch(codes, params, out, compression)


def _is_for_native(x: Tensor, compression: Compression) -> bool:
    """Searched scales are found by sums, which torch's operators define."""
    is_supported = compression.scales is Scales.MINMAX and x.dtype in matrices.TYPES
    return is_supported and x.device.type == "cpu"


def _in_threads(work: Callable[..., None], rows: int, n: int, *arguments: object) -> None:
    """``work(*arguments, rows, threads)`` for rows of n values: few of them are no work for a second thread."""
    threads = max(1, min(torch.get_num_threads(), rows * n // THREAD_VALUES))
    work(*arguments, ctypes.c_int64(rows), ctypes.c_int64(threads))


def dequantize_with_torch(codes: Tensor, params: Tensor, out: Tensor, compression: Codes) -> None:
    """The reference, on any device: codes (R, bytes), params (R, groups, 2) -> out (R, n).

    Of 4 bits it moves 13 bytes for each value of 2 bytes: two masked or shifted halves (2), put in their places as
    float32 (5), read and written scaled (6).
    """
    for part in _tiles(out.shape[0], out.shape[1], out.device):
        if isinstance(compression, Microscaling):
            microscaling.dequantize_with_torch(codes[part], params[part], out[part])
            continue
        for values, stored, group_params, width in _columns(out[part], codes[part], params[part], compression):
            unpacked = _unpack(stored, compression.bits)
            scale, smallest = group_params[..., :1].float(), group_params[..., 1:].float()
            # In float32, whose product of a code and a scale is exact, and rounded to the type of ``values`` once more.
            torch.addcmul(smallest, unpacked[..., :width], scale, out=values)


def _tiles(rows: int, n: int, device: torch.device) -> list[slice]:
    """Slices of rows with about as many values as temporaries may have."""
    values = TILE_VALUES if device.type == "cpu" else DEVICE_TILE_VALUES
    step = max(1, values // n)
    return [slice(row, min(row + step, rows)) for row in range(0, rows, step)]


def _columns(
    values: Tensor, codes: Tensor, params: Tensor, compression: Compression
) -> list[tuple[Tensor, Tensor, Tensor, int]]:
    """Views of R rows by group: (values (R, groups, width), codes, params (R, groups, 2), width).

    The groups of full width, then the short last one, where there are any.
    """
    n = values.shape[1]
    size = compression.group_size
    full, rest = divmod(n, size)
    stop = full * compression.code_bytes(size)
    pieces = []
    if full:
        pieces.append(
            (
                values[:, : full * size].unflatten(1, (full, size)),
                codes[:, :stop].unflatten(1, (full, -1)),
                params[:, :full],
                size,
            )
        )
    if rest:
        pieces.append(
            (
                values[:, full * size :].unflatten(1, (1, rest)),
                codes[:, stop:].unflatten(1, (1, -1)),
                params[:, full:],
                rest,
            )
        )
    return pieces


def _quantize_groups(
    values: Tensor, codes: Tensor, params: Tensor, width: int, compression: Compression, importance: Tensor | None
) -> None:
    """values (R, groups, width) -> codes (R, groups, bytes) and params (R, groups, 2), written in place."""
    numbers = values.float()
    # aminmax would take six times as long as both of these on a processor.
    low, high = numbers.amin(dim=-1, keepdim=True), numbers.amax(dim=-1, keepdim=True)
    # Both ends are rounded first: groups that float16 cannot tell from constant ones get scale 0.
    smallest, largest = low.clamp(*LIMITS).half(), high.clamp(*LIMITS).half()
    span = largest.float() - smallest.float()
    scale = _within_float16(span / (compression.levels - 1), smallest, compression)
    if compression.scales is not Scales.MINMAX:
        numbers = numbers.contiguous()  # sums of other layouts round differently
        line = least_squares(numbers, low, high, compression.levels, importance)
        searched = line[1].clamp(*LIMITS).half()
        steps = _within_float16(line[0].clamp(0, FLOAT16_LARGEST), searched, compression)
        # Rounding to float16 may cost more than the search has won.
        before = _error(numbers, scale, smallest, compression, importance)
        won = _error(numbers, steps, searched, compression, importance) < before
        scale, smallest = torch.where(won, steps, scale), torch.where(won, searched, smallest)
    params[..., :1], params[..., 1:] = scale, smallest
    codes_of = _nearest(numbers, scale, smallest, compression)
    _pack(pad(codes_of, (0, -width % 8)) if width % 8 else codes_of, compression.bits, codes)


def _within_float16(scale: Tensor, smallest: Tensor, compression: Compression) -> Tensor:
    """The scale in float16; one unit less if rounding it would put the largest code beyond float16's largest number."""
    rounded = scale.half()
    beyond = smallest.float() + rounded.float() * (compression.levels - 1) > FLOAT16_LARGEST
    return torch.where(beyond, (rounded.view(torch.int16) - 1).view(torch.float16), rounded)


def _nearest(numbers: Tensor, scale: Tensor, smallest: Tensor, compression: Compression) -> Tensor:
    """Codes as float32."""
    divisor = scale.float().masked_fill_(scale == 0, torch.inf)  # constant groups: code 0
    return numbers.sub(smallest.float()).div_(divisor).round_().clamp_(0, compression.levels - 1)


def _error(
    numbers: Tensor, scale: Tensor, smallest: Tensor, compression: Compression, weights: Tensor | None
) -> Tensor:
    """Squared error of each group (..., 1)."""
    back = _nearest(numbers, scale, smallest, compression).mul_(scale.float()).add_(smallest.float())
    squares = back.sub_(numbers).square_()
    return (squares if weights is None else squares.mul_(weights)).sum(dim=-1, keepdim=True)


def _pack(whole: Tensor, bits: int, out: Tensor) -> None:
    """whole (..., m) codes as float32, m a multiple of 8 -> out (..., m * bits / 8), see the module's layout."""
    if bits == 8:
        out.copy_(whole)
    elif bits == 4:
        low, high = whole.chunk(2, dim=-1)
        out.copy_(high.mul(16).add_(low))  # exact, and faster than shifting bytes
    else:
        v = whole.to(torch.int32).to(torch.uint8).chunk(8, dim=-1)
        p0 = v[0] | (v[1] << 3) | (v[6] << 6)
        p1 = v[2] | (v[3] << 3) | ((v[6] & 4) << 4) | ((v[7] & 4) << 5)
        p2 = v[4] | (v[5] << 3) | (v[7] << 6)
        out.copy_(torch.cat((p0, p1, p2), dim=-1))


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """packed (..., m * bits / 8) -> codes (..., m) as float32, see the module's layout."""
    if bits == 8:
        return packed.float()
    values = packed.shape[-1] * 8 // bits
    out = torch.empty((*packed.shape[:-1], values), dtype=torch.float32, device=packed.device)
    if bits == 4:
        low, high = out.chunk(2, dim=-1)
        low.copy_(packed & 15)
        high.copy_(packed >> 4)
        return out
    p0, p1, p2 = packed.chunk(3, dim=-1)
    parts = (
        p0 & 7,
        (p0 >> 3) & 7,
        p1 & 7,
        (p1 >> 3) & 7,
        p2 & 7,
        (p2 >> 3) & 7,
        (p0 >> 6) | ((p1 >> 4) & 4),
        (p2 >> 6) | ((p1 >> 5) & 4),
    )
    for chunk, part in zip(out.chunk(8, dim=-1), parts, strict=True):
        chunk.copy_(part)
    return out
