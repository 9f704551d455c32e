"""The product of few rows with a packed weight on a GPU: its text compiled for the host and carried out there, compiled
for devices that are not here, and what happens where it cannot be."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flexgen_bench.core.compression import Compression
from flexgen_bench.core.microscaling import MXFP4, Codes
from flexgen_bench.kernels import fused_product, ops
from flexgen_bench.kernels.cuda import nvrtc
from flexgen_bench.kernels.fused_product import MOST_ROWS, SOURCE, THREADS, TYPES, Variant, argument, variant
from flexgen_bench.kernels.quantization import QuantizedWeight, dequantize, quantize
from tests.support.host_cuda import host_library

FLOATS = tuple(TYPES)
HALF, BRAIN, SINGLE = FLOATS
# (type, codes, rows, outputs, inputs, values before x begins): every kind of pieces, groups that are short, one output
# and more than a block makes, one row and as many as there may be, memory that is not aligned.
CASES = [
    (HALF, Compression(4, 64), 1, 17, 1024, 0),
    (HALF, Compression(4, 64), 7, 33, 1100, 0),
    (HALF, Compression(4, 64), 16, 9, 592, 0),
    (HALF, Compression(4, 64), 4, 5, 512, 1),
    (HALF, Compression(4, 8), 3, 4, 77, 0),
    (HALF, Compression(4, 24), 2, 6, 331, 3),
    (HALF, Compression(4, 16), 5, 16, 656, 0),
    (HALF, Compression(8, 64), 1, 1, 1, 0),
    (HALF, Compression(8, 8), 8, 21, 264, 0),
    (HALF, Compression(8, 64), 9, 3, 301, 0),
    (HALF, MXFP4, 4, 35, 1056, 0),
    (BRAIN, Compression(4, 64), 2, 19, 640, 0),
    (BRAIN, Compression(8, 24), 13, 2, 95, 1),
    (BRAIN, MXFP4, 16, 7, 96, 2),
    (SINGLE, Compression(4, 64), 8, 18, 700, 0),
    (SINGLE, Compression(4, 128), 1, 8, 2080, 0),
    (SINGLE, Compression(8, 64), 3, 12, 520, 0),
    (SINGLE, MXFP4, 2, 16, 320, 0),
]


def any_weight(outputs: int, inputs: int, codes: Codes, dtype: torch.dtype) -> QuantizedWeight:
    if isinstance(codes, Compression):
        return QuantizedWeight(*quantize(torch.randn(outputs, inputs) * 2, codes), (outputs, inputs), codes, dtype)
    drawn = torch.randint(0, 256, (outputs, codes.code_bytes(inputs)), dtype=torch.uint8)
    powers = torch.randint(115, 135, (outputs, codes.groups(inputs)), dtype=torch.uint8)
    powers[0, 0] = 0  # 2^-127: denormal
    return QuantizedWeight(drawn, powers, (outputs, inputs), codes, dtype)


def drawn(
    dtype: torch.dtype, codes: Codes, rows: int, outputs: int, inputs: int, skipped: int
) -> tuple[Tensor, QuantizedWeight, Tensor]:
    """x whose rows have gaps between them, weight, bias."""
    torch.manual_seed(rows * 1000 + inputs)
    apart = inputs + (8 if skipped == 0 else 5)
    x = torch.randn(rows * apart + 8).to(dtype)[skipped:][: rows * apart].view(rows, apart)[:, :inputs]
    return x, any_weight(outputs, inputs, codes, dtype), torch.randn(outputs).to(dtype)


def expected_of(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """In float64, with values that are not rounded to x's type."""
    values = dequantize(weight.codes, weight.params, weight.shape[1], weight.compression, torch.float32)
    y = x.double() @ values.double().t()
    return (y if bias is None else y + bias.double()).to(x.dtype)


def called(of: Variant) -> str:
    [call] = re.findall(r"\{ (multiply<[^>]*>\(p\)); \}", of.text)
    return call


@pytest.fixture(scope="module")
def on_host() -> dict[Variant, object]:
    """The kernels that the cases need, made at once."""
    needed = list(dict.fromkeys(variant(*drawn(*case)[:2]) for case in CASES))
    calls = {f"kernel_{number}": called(of) for number, of in enumerate(needed)}
    library = host_library(SOURCE, "Product", calls, THREADS)
    return {of: getattr(library, f"kernel_{number}") for number, of in enumerate(needed)}


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{TYPES[c[0]]}-{c[1]}-{c[2]}x{c[3]}x{c[4]}-{c[5]}".replace("/", "_")
)
def test_the_text_on_the_host_says_what_its_reference_says(case: tuple, on_host: dict[Variant, object]) -> None:
    """The whole kernel, thread by thread: nothing beside y is written, with a bias and without."""
    x, weight, bias = drawn(*case)
    rows, outputs = x.shape[0], weight.shape[0]
    of = variant(x, weight)
    tolerance = {"rtol": 2e-3, "atol": 1e-3} if x.dtype is HALF else {"rtol": 1e-2, "atol": 1e-3}
    for given in (bias, None):
        y = torch.full((rows + 1, outputs), 77, dtype=x.dtype)
        job = argument(x, weight, given, y[:rows])
        on_host[of](ctypes.c_int(-(-outputs // of.outputs)), ctypes.byref(job))  # type: ignore[operator]
        expected = expected_of(x, weight, given)
        torch.testing.assert_close(
            y[:rows], expected, **(tolerance if x.dtype is not SINGLE else {"rtol": 1e-5, "atol": 1e-3})
        )
        assert bool((y[rows] == 77).all())


def test_cases_are_of_every_kind() -> None:
    kinds = {variant(*drawn(*case)[:2]) for case in CASES}
    assert {of.rows for of in kinds} == set(fused_product.ROWS)
    for is_micro, bits in ((False, 4), (False, 8), (True, 4)):
        assert {of.is_whole for of in kinds if (of.is_micro, of.bits) == (is_micro, bits)} == {True, False}
