"""Products on the processor with weights narrower than float32 (bfloat16, float16, quantized), and with few float32
rows.

One call of native/linear.cpp does a whole product, with threads of its own. Few rows of x read the weight straight from
how it is stored; for more, pieces of it are unpacked in a core's own cache. Sums are in float32 and rounded once, at
the end; where the processor multiplies pairs of bfloat16 numbers, bfloat16 products use that.
docs/notes/cpu_products.md has the measurements.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from flexgen_bench.kernels.native import matrices
from flexgen_bench.kernels.native.build import library
from flexgen_bench.kernels.quantization import QuantizedWeight

# Rows of x that are packed at a time; a weight is read once per block, which costs little from some hundred rows on.
BLOCK_ROWS = 256  # of native/linear.cpp
# Values of a weight that are worth another thread, at 8 rows or fewer: about 20 microseconds of work.
THREAD_VALUES = 1 << 18
# Below this many values calling torch takes less time than calling the native kernel.
SMALLEST_WEIGHT = 1 << 16
# With a matrix unit, unpacking in registers still wins for quantized weights up to here: such products read, they don't
# compute.
MATRIX_UNIT_ROWS = 16
# Dequantized rows at a time where torch multiplies: on a processor larger than its L2 cache, because each call of torch
# packs x anew (docs/notes/cpu_products.md); on a GPU whole matrices of small models, and pieces of 64 MiB of large
# ones.
CPU_TILE_BYTES, DEVICE_TILE_BYTES = 8 << 20, 64 << 20
# Rows of x for which products with plain weights are faster here; more float32 rows are what torch is tuned for.
NARROW_ROWS, FLOAT32_ROWS = (1, 1 << 30), (4, 12)
TILE_ROWS = 48  # of native/linear.cpp


class _Product(ctypes.Structure):
    """``Product`` of native/linear.cpp."""

    _fields_ = (
        ("w", matrices.Matrix),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("x_row", ctypes.c_int64),
        ("y_row", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("activations", ctypes.c_int64),
    )


def is_faster(x: Tensor, weight: Tensor | QuantizedWeight) -> bool:
    """Whether ``narrow_linear`` can take these and is expected to beat a call of torch on this processor."""
    is_small = isinstance(weight, Tensor) and weight.numel() < SMALLEST_WEIGHT
    return not is_small and is_fast_here(x, weight)


def is_fast_here(x: Tensor, weight: Tensor | QuantizedWeight) -> bool:
    """The same without what calling it from Python takes."""
    if x.device.type != "cpu" or x.dim() != 2 or x.shape[0] == 0 or x.dtype not in matrices.TYPES:
        return False
    native = _native()
    if native is None:
        return False
    if isinstance(weight, QuantizedWeight):
        if weight.activations is not None:
            return True
        return x.shape[0] <= MATRIX_UNIT_ROWS or _beats_torch(native, x.dtype, True)
    fewest, most = FLOAT32_ROWS if x.dtype is torch.float32 else NARROW_ROWS
    if not isinstance(weight, Tensor) or not fewest <= x.shape[0] <= most:
        return False
    usable = weight.dim() == 2 and weight.stride(1) == 1 and weight.dtype == x.dtype
    return usable and _beats_torch(native, x.dtype, False)


def narrow_linear(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None) -> Tensor:
    """x (N, in) times weight (out, in) transposed plus bias (out), summed in float32 and rounded once to x's type.

    Memory: ``workspace_bytes``.
    """
    native = _native()
    assert native is not None
    x = x if x.stride(1) == 1 else x.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    job = product(x, weight, bias, y)
    native.linear(ctypes.byref(job))
    return y


def product(x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, y: Tensor) -> _Product:
    """The native kernel's job: x (N, in) with contiguous rows, y (N, out) without gaps. Does not keep them alive."""
    outputs, inputs = weight.shape
    assert weight.dtype == x.dtype, (weight.dtype, x.dtype)
    assert x.shape[1] == inputs, (x.shape, weight.shape)
    assert bias is None or (bias.dtype == x.dtype and bias.shape == (outputs,)), bias
    activations = None
    if isinstance(weight, QuantizedWeight):
        activations = weight.activations
        matrix = weight.matrix
    else:
        matrix = matrices.plain(weight)
    worthwhile = outputs * inputs * (1 + x.shape[0] // 8) // THREAD_VALUES
    return _Product(
        matrix,
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.stride(0),
        outputs,
        x.shape[0],
        outputs,
        max(1, min(torch.get_num_threads(), worthwhile)),
        activations or 0,
    )


def tiled_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """The same with torch, on any device: dequantize some output rows, multiply, go on with the next ones."""
    outputs, inputs = weight.shape
    assert weight.dtype == x.dtype, (weight.dtype, x.dtype)
    room = CPU_TILE_BYTES if x.device.type == "cpu" else DEVICE_TILE_BYTES
    step = max(1, min(outputs, room // (inputs * x.element_size())))
    if step == outputs:
        return F.linear(x, weight.dequantize(), bias)
    y = x.new_empty((x.shape[0], outputs))
    tile = x.new_empty((step, inputs))
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        values = weight.rows(start, stop, out=tile[: stop - start])
        y[:, start:stop] = F.linear(x, values, None if bias is None else bias[start:stop])
    return y


def workspace_bytes(rows: int, inputs: int, threads: int, group_size: int = 64) -> int:
    """Upper bound of ``narrow_linear``'s temporary memory for ``rows`` rows and a weight of any number of outputs.

    ``tiled_linear`` takes CPU_TILE_BYTES or DEVICE_TILE_BYTES instead, and as many bytes as y has in the worst case.
    """
    block = -(-min(rows, BLOCK_ROWS) // 16) * 16
    packed = block * (inputs + 32)
    per_thread = TILE_ROWS * (4 * max(256, group_size) + 16 + block) + 1024
    return 4 * (packed + threads * per_thread)


def _native() -> ctypes.CDLL | None:
    native = library("linear")
    return None if native is None else _declared(native)


@functools.cache
def _declared(native: ctypes.CDLL) -> ctypes.CDLL:
    """Argument types, once per library: without them ctypes would pass pointers as 32-bit numbers."""
    pointer, size, kind = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    native.packed_bytes.argtypes, native.packed_bytes.restype = [kind, size, size], size
    native.beats_torch.argtypes, native.beats_torch.restype = [kind, kind], kind
    native.linear.argtypes, native.linear.restype = [pointer], None
    return native


@functools.cache
def _beats_torch(native: ctypes.CDLL, dtype: torch.dtype, quantized: bool) -> bool:
    return bool(native.beats_torch(matrices.TYPES[dtype], quantized))
