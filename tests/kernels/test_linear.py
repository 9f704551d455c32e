"""Linear layers: native products with plain and quantized weights, torch's, and which of them is taken."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flexgen_bench.core.compression import Compression
from flexgen_bench.kernels import narrow_linear, ops
from flexgen_bench.kernels.native.build import library
from flexgen_bench.kernels.quantization import QuantizedWeight

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
WEIGHTS = [None, Compression(4), Compression(8), Compression(3), Compression(4, 24), Compression(3, 512)]


def assert_product(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """One rounding to y's type, and sums that are as good as float32's: nothing else may be lost."""
    x, weight = x.double(), weight.double()
    exact = x @ weight.t() + (0 if bias is None else bias.double())
    magnitude = x.abs() @ weight.abs().t() + (0 if bias is None else bias.double().abs())
    smallest = torch.finfo(y.dtype).smallest_normal * ROUNDING[y.dtype]
    allowed = exact.abs() * ROUNDING[y.dtype] * 1.01 + 2e-6 * magnitude + smallest
    assert bool(((y.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", sorted(ROUNDING, key=str), ids=str)
@pytest.mark.parametrize("compression", WEIGHTS, ids=str)
def test_native_products(
    compression: Compression | None, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of rows has its own kernel or panels; sizes that are no multiple of anything; several blocks of
    rows."""
    if library("linear") is None:
        pytest.skip("no native kernels here")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(narrow_linear, "THREAD_VALUES", 1)
    for outputs, inputs in ((1, 1), (97, 40), (150, 715)):
        weight = (torch.randn(outputs, inputs) * 0.1).to(dtype)
        used = weight if compression is None else QuantizedWeight.of(weight, compression)
        values = used.dequantize() if isinstance(used, QuantizedWeight) else weight
        for rows in (*range(1, 10), 16, 17, 33, 50, 65, 128, 300):
            x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(outputs).to(dtype)
            assert_product(narrow_linear.narrow_linear(x, used, bias), x, values, bias)
        y = narrow_linear.narrow_linear(x[::2], used, None)
        assert y.is_contiguous()
        assert_product(y, x[::2], values, None)


@pytest.mark.parametrize("switch", ["0", "1"])
@pytest.mark.parametrize("dtype", sorted(ROUNDING, key=str), ids=str)
@pytest.mark.parametrize("compression", [None, Compression(4)], ids=str)
def test_linear(
    compression: Compression | None, dtype: torch.dtype, switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever way is chosen, with native kernels and without: torch's own products are held to the same bound.

    torch may split a sum and round its parts (bfloat16, float16), so those get the bound twice.
    """
    monkeypatch.setenv("FLEXGEN_NATIVE", switch)
    monkeypatch.setattr(narrow_linear, "CPU_TILE_BYTES", 40_000)
    weight, bias = (torch.randn(300, 260) * 0.1).to(dtype), torch.randn(300).to(dtype)
    used = weight if compression is None else QuantizedWeight.of(weight, compression)
    values = used.dequantize() if isinstance(used, QuantizedWeight) else weight
    for rows in (0, 1, 3, 8, 31, 70, 300):
        x = torch.randn(rows, 260).to(dtype)
        for b in (None, bias):
            y = ops.linear(x, used, b)
            assert y.dtype == dtype
            assert y.shape == (rows, 300)
            exact = F.linear(x.double(), values.double(), None if b is None else b.double())
            error = (y.double() - exact).abs()
            assert bool((error <= 2 * ROUNDING[dtype] * (exact.abs() + 1) + 1e-4).all())


def test_native_product_keeps_what_is_not_finite() -> None:
    """Activations that overflow have to be seen by whoever checks them, not turned into numbers."""
    if library("linear") is None:
        pytest.skip("no native kernels here")
    weight = torch.ones(64, 1024, dtype=torch.bfloat16)
    x = torch.zeros(20, 1024, dtype=torch.bfloat16)
    x[3, 5], x[7, 9] = torch.nan, torch.inf
    y = narrow_linear.narrow_linear(x, weight, None)
    assert bool(y[3].isnan().all())
    assert bool((y[7] == torch.inf).all())
    assert int(y.isfinite().all(dim=1).sum()) == 18


@pytest.mark.parametrize("rows", [1, 8, 40, 700])
def test_workspace_is_what_the_planner_is_told(rows: int) -> None:
    """x packed in float32, block by block, is nearly all of it; the rest is buffers of a few tens of KiB per thread."""
    native = narrow_linear._native()
    if native is None:
        pytest.skip("no native kernels here")
    block = min(rows, narrow_linear.BLOCK_ROWS)
    packed = native.packed_bytes(0, block, 2048)
    per_thread = 4 * narrow_linear.TILE_ROWS * (256 + 16 + 256)
    assert packed < narrow_linear.workspace_bytes(rows, 2048, 1) <= packed + 4 * per_thread
