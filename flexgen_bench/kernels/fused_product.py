"""Products on a GPU of few rows with a weight in 4 or 8 bits: unpacked in registers, so its codes are read once.

Unpacking it first moves 2.56 bytes for each value of 4 bits and 2 for the product with it, where 0.56 are enough
(groups of 64, 16-bit types). ``cuda/quantized_product.cu`` is CUDA C++ for any compute capability that NVRTC compiles
for: a T4's tensor cores would not help, since few rows are bound by reading codes. docs/notes/packed_products.md has
the counts and the bounds.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flexgen_bench.core.microscaling import Codes, Microscaling
from flexgen_bench.kernels.cuda.driver import CannotLaunch, Kernel
from flexgen_bench.kernels.cuda.nvrtc import compiled
from flexgen_bench.kernels.quantization import QuantizedWeight, dequantize_with_torch
from flexgen_bench.kernels.trial import any_codes, passes, require_close, warn

SOURCE = Path(__file__).parent / "cuda" / "quantized_product.cu"
# Rows of x up to which a weight is read as it lies. A T4 multiplies 16 rows at 1.4 to 2.3e11 values a second, and
# unpacks and reads again at 6e10 (docs/notes/packed_products.md).
MOST_ROWS = 16
ROWS = (1, 2, 4, 8, MOST_ROWS)  # of which there are kernels; fewer rows are multiplied with the next
THREADS = 128
NAME = "product"
TYPES = {torch.float16: "Half", torch.bfloat16: "Brain", torch.float32: "Single"}
_BITS = (4, 8)


class Product(ctypes.Structure):
    """``Product`` of the kernel's text."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("numbers", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("x_row", ctypes.c_int64),
        ("count", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("row_bytes", ctypes.c_int32),
        ("groups", ctypes.c_int32),
    )


class Variant(NamedTuple):
    """What a kernel is compiled for. is_whole: see the function of that name; rows: at most, one of ROWS."""

    dtype: torch.dtype
    bits: int
    group: int
    is_micro: bool
    is_whole: bool
    rows: int

    @property
    def outputs(self) -> int:
        """Columns of y that a block of THREADS makes: OUTPUTS of the text for each warp."""
        return THREADS // 32 * (2 if self.rows > 8 else 4)

    @property
    def text(self) -> str:
        """CUDA C++ with one function, NAME. Three blocks on a multiprocessor: 168 registers a thread, which all
        variants have enough with."""
        flags = (str(flag).lower() for flag in (self.is_micro, self.is_whole))
        given = ", ".join((TYPES[self.dtype], str(self.bits), str(self.group), *flags, str(self.rows)))
        function = f"__launch_bounds__({THREADS}, 3) {NAME}(const Product p) {{ multiply<{given}>(p); }}"
        return f'{SOURCE.read_text(encoding="utf-8")}\nextern "C" __global__ void {function}\n'


def fused_product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor | None:
    """x (N, in), on a CUDA device, times weight (out, in) transposed plus bias (out), summed in float32 and rounded
    once to x's type; None if it must be done in another way: more than MOST_ROWS rows, other codes, a device for which
    there is no kernel, or whose driver refuses it."""
    if not 0 < x.shape[0] <= MOST_ROWS or weight.codes.data_ptr() % 4 or weight.params.data_ptr() % 4:
        return None
    if not is_fused(x.device, weight.compression, x.dtype):
        return None
    x = x if x.stride(1) == 1 else x.contiguous()
    of = variant(x, weight)
    if (x.device, of) in _refused:
        return None
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((x.shape[0], weight.shape[0]))
    given = argument(x, weight, bias, y)
    try:
        _launch(x.device, of, given)
    except CannotLaunch as error:
        _refused.add((x.device, of))
        warn(error, *_missing(str(weight.compression), x.dtype))
        return None
    return y


def is_fused(device: torch.device, compression: Codes, dtype: torch.dtype) -> bool:
    """Whether such products are made here. Asked for the first time it compiles and tries one, on the device."""
    if device.type != "cuda" or compression.bits not in _BITS or dtype not in TYPES:
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return _is_right(torch.device("cuda", index), compression, dtype)


def variant(x: Tensor, weight: QuantizedWeight) -> Variant:
    """Of the kernel for these: x (N, in) with contiguous rows."""
    compression = weight.compression
    rows = next(rows for rows in ROWS if rows >= x.shape[0])
    is_micro = isinstance(compression, Microscaling)
    return Variant(x.dtype, compression.bits, compression.group_size, is_micro, is_whole(x, weight), rows)


def is_whole(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether 8 bytes of codes, with the 8 or twice 8 values of x that belong to them, can be read at once: all are in
    one group and none is missing, and everything lies at a multiple of its size."""
    step = 8 * (8 // weight.compression.bits)
    fits = weight.compression.group_size % step == 0 and weight.shape[1] % step == 0
    return fits and weight.codes.data_ptr() % 8 == 0 and x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0


def argument(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, y: Tensor) -> Product:
    """x (N, in) with contiguous rows, bias contiguous, y (N, out) without gaps. Does not keep them alive."""
    outputs, inputs = weight.shape
    assert weight.dtype == x.dtype, (weight.dtype, x.dtype)
    assert x.shape[1] == inputs, (x.shape, weight.shape)
    assert weight.codes.is_contiguous(), weight.codes.stride()
    assert weight.params.is_contiguous(), weight.params.stride()
    assert bias is None or (bias.dtype == x.dtype and bias.shape == (outputs,)), bias
    return Product(
        weight.codes.data_ptr(),
        weight.params.data_ptr(),
        x.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.stride(0),
        x.shape[0],
        outputs,
        inputs,
        weight.codes.shape[1],
        weight.params.shape[1],
    )


# Passed their trial, and were refused by the driver when they were needed: not asked for again.
_refused: set[tuple[torch.device, Variant]] = set()


@functools.cache
def _kernel(device: torch.device, of: Variant) -> Kernel:
    """Raises CannotCompile, CannotLaunch."""
    return _made(device, of)


def _made(device: torch.device, of: Variant) -> Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    return Kernel(compiled(of.text, f"sm_{major}{minor}"), NAME, device.index or 0)


def _launch(device: torch.device, of: Variant, given: Product) -> None:
    stream: int = torch.cuda.current_stream(device).cuda_stream
    _kernel(device, of).launch(-(-given.outputs // of.outputs), THREADS, given, stream)


def _missing(codes: str, dtype: torch.dtype) -> tuple[str, str]:
    name = str(dtype).removeprefix("torch.")
    lost = "weights are unpacked before they are multiplied with, which moves eight times as many bytes."
    return f"product of few rows with {codes} weights in {name}", lost


@functools.cache
def _is_right(device: torch.device, compression: Codes, dtype: torch.dtype) -> bool:
    def try_it() -> None:
        """Every variant that there is, so that none is used untried or compiled while somebody waits for a token: each
        number of rows, with pieces that are whole and, since x's rows are apart by an odd number, with pieces that are
        not; more outputs than a block makes."""
        size, outputs = compression.group_size, 37
        ragged = 5 * size if isinstance(compression, Microscaling) else 5 * size + 3
        for rows, (inputs, apart) in itertools.product(ROWS, ((8 * size, 8 * size), (ragged, ragged // 2 * 2 + 1))):
            codes, params = any_codes(outputs, inputs, compression, device)
            weight = QuantizedWeight(codes, params, (outputs, inputs), compression, dtype)
            x = torch.randn(rows, apart, generator=torch.Generator().manual_seed(0)).to(device, dtype)[:, :inputs]
            y = torch.full((rows, outputs), torch.nan, dtype=dtype, device=device)
            _launch(device, variant(x, weight), argument(x, weight, None, y))
            values = torch.empty(outputs, inputs, device=device)
            dequantize_with_torch(codes, params, values, compression)
            require_close(y, x.double() @ values.double().t())

    return passes(try_it, *_missing(str(compression), dtype))
