"""The threads inside native libraries: callers beside each other, and processes that were forked."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flexgen_bench.core.compression import Compression
from flexgen_bench.kernels import narrow_linear, ops, quantization
from flexgen_bench.kernels.narrow_linear import narrow_linear as product
from flexgen_bench.kernels.native.build import library
from flexgen_bench.machine import host


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    if library("linear") is None:
        pytest.skip("no native kernels here")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(narrow_linear, "THREAD_VALUES", 1)


def test_several_callers_at_once() -> None:
    """Lanes compute beside each other: each call gets its own product, whoever helps with it."""
    weights = [torch.randn(200 + 50 * i, 96) for i in range(4)]
    inputs = [torch.randn(rows, 96) for rows in (1, 7, 20, 40)]

    def work(number: int) -> bool:
        x, w = inputs[number % 4], weights[number // 4 % 4]
        return torch.allclose(product(x, w, None), x @ w.t(), atol=1e-4)

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(work, range(400)))


def _in_child(x: torch.Tensor, w: torch.Tensor, found: torch.Tensor) -> None:
    found.copy_(product(x, w, None))


def test_a_forked_process_computes() -> None:
    """It has none of the threads that its parent started."""
    x, w = torch.randn(3, 64), torch.randn(500, 64)
    expected = product(x, w, None)
    found = torch.zeros_like(expected).share_memory_()
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(x, w, found))
    child.start()
    child.join(timeout=60)
    if child.is_alive():
        child.kill()
    assert child.exitcode == 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantizing_gives_the_same_bits_on_any_number_of_threads(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call is handed over once, and helpers take pieces of its rows: odd numbers of them, and groups that are not
    full."""
    compression, x = Compression(bits, 64), torch.randn(1001, 200)
    found = []
    for least in (1, 1 << 30):  # three threads, and one
        monkeypatch.setattr(quantization, "THREAD_VALUES", least)
        codes, params = quantization.quantize(x, compression)
        found.append((codes, params, quantization.dequantize(codes, params, 200, compression, torch.float16)))
    assert all(torch.equal(several, one) for several, one in zip(*found, strict=True))


def test_cores_are_left_to_the_lanes_that_issue(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 attention threads on 16 cores made every step that was issued to the GPU take two to fifteen times as long.
    What is idle anyway is left to them, and of few cores nothing is given away."""
    cases = (((16, 16), 16, 14), ((16, 16), 15, 14), ((16, 16), 8, 8), ((8, 16), 8, 6), ((8, 16), 16, 14))
    for (physical, logical), threads, left in (*cases, ((4, 8), 4, 4), ((2, 2), 2, 2)):
        monkeypatch.setattr(host, "physical_cores", lambda cores=physical: cores)
        monkeypatch.setattr(host, "logical_cores", lambda cores=logical: cores)
        assert host.threads_beside_a_gpu(threads) == left, (physical, logical, threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm(dtype: torch.dtype) -> None:
    """Odd lengths, rows that do not follow each other, and as many as are shared out."""
    for rows, columns in ((1, 1), (3, 50), (5, 64), (700, 130)):
        x = (torch.randn(rows, columns + 3) * 3).to(dtype)[:, :columns]
        weight = torch.randn(columns).to(dtype)
        wide = x.double()
        exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
        error = (ops.rms_norm(x, weight, 1e-5).double() - exact).abs()
        assert bool((error <= exact.abs() * (torch.finfo(dtype).eps / 2 * 1.01 + 2e-6) + 1e-7).all())
