"""The product of few rows with a packed weight on a GPU: its text compiled for the host and carried out there, compiled
for devices that are not here, and what happens where it cannot be."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexgen_bench.core.compression import Compression
from flexgen_bench.core.microscaling import MXFP4, Codes
from flexgen_bench.kernels import fused_product as module
from flexgen_bench.kernels.cuda.driver import CannotLaunch, Kernel
from flexgen_bench.kernels.cuda.nvrtc import CannotCompile, compiled
from flexgen_bench.kernels.fused_product import (
    MOST_ROWS,
    ROWS,
    SOURCE,
    THREADS,
    TYPES,
    Product,
    Variant,
    argument,
    fused_product,
    is_fused,
    variant,
)
from flexgen_bench.kernels.quantization import QuantizedWeight, dequantize, quantize
from tests.support.host_cuda import host_library

HALF, BRAIN, SINGLE = TYPES
TOLERANCE = {HALF: 2e-3, BRAIN: 1e-2, SINGLE: 1e-5}
FOUR, CPU = Compression(4, 64), torch.device("cpu")
Case = tuple[torch.dtype, Codes, int, int, int, int]
# (type, codes, rows, outputs, inputs, values before x begins): every kind of pieces, groups that are short, one output
# and more than a block makes, one row and as many as there may be, memory that is not aligned.
CASES: list[Case] = [
    (HALF, Compression(4, 64), 1, 17, 1024, 0),
    (HALF, Compression(4, 64), 7, 33, 1100, 0),
    (HALF, Compression(4, 64), 16, 9, 592, 0),
    (HALF, Compression(4, 64), 4, 5, 512, 1),
    (HALF, Compression(4, 64), 2, 20, 576, 0),
    (HALF, Compression(4, 64), 3, 6, 128, 0),
    (HALF, Compression(4, 64), 8, 5, 64, 0),
    (HALF, Compression(4, 64), 1, 6, 320, 1),
    (HALF, Compression(4, 64), 2, 5, 203, 0),
    (HALF, Compression(4, 64), 15, 7, 192, 3),
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


class OnHost:
    """A kernel of the host library, in the place of a device's."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def launch(self, blocks: int, threads: int, given: Product, stream: int) -> None:
        assert threads == THREADS
        self._function(ctypes.c_int(blocks), ctypes.byref(given))


@pytest.fixture(scope="module")
def on_host() -> dict[Variant, OnHost]:
    """The kernels that the cases need, made at once."""
    needed = list(dict.fromkeys(variant(*drawn(*case)[:2]) for case in CASES))
    calls = {f"kernel_{number}": called(of) for number, of in enumerate(needed)}
    library = host_library(SOURCE, "Product", calls, THREADS)
    return {of: OnHost(getattr(library, f"kernel_{number}")) for number, of in enumerate(needed)}


@pytest.fixture
def pretended(on_host: dict[Variant, OnHost], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device that the host's kernels stand in for."""
    monkeypatch.setattr(module, "_made", lambda device, of: on_host[of])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    forget()
    yield
    forget()


def forget() -> None:
    module._kernel.cache_clear()
    module._is_right.cache_clear()
    module._refused.clear()


def name_of(case: Case) -> str:
    dtype, codes, rows, outputs, inputs, skipped = case
    return f"{TYPES[dtype]}-{codes}-{rows}x{outputs}x{inputs}+{skipped}".replace("/", "_")


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_text_on_the_host_says_what_its_reference_says(case: Case, on_host: dict[Variant, OnHost]) -> None:
    """The whole kernel, thread by thread, with a bias and without; nothing beside y is written."""
    x, weight, bias = drawn(*case)
    rows, outputs = x.shape[0], weight.shape[0]
    of = variant(x, weight)
    for given in (bias, None):
        y = torch.full((rows + 1, outputs), 77, dtype=x.dtype)
        on_host[of].launch(-(-outputs // of.outputs), THREADS, argument(x, weight, given, y[:rows]), 0)
        torch.testing.assert_close(y[:rows], expected_of(x, weight, given), rtol=TOLERANCE[x.dtype], atol=1e-3)
        assert bool((y[rows] == 77).all())


def test_cases_are_of_every_kind() -> None:
    kinds = {variant(*drawn(*case)[:2]) for case in CASES}
    assert {of.rows for of in kinds} == set(ROWS)
    for is_micro, bits in ((False, 4), (False, 8), (True, 4)):
        assert {of.is_whole for of in kinds if (of.is_micro, of.bits) == (is_micro, bits)} == {True, False}


@pytest.mark.usefixtures("pretended")
def test_a_product_takes_the_kernel_for_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies between its rows and values; more rows, and where there is no such kernel, are somebody else's."""
    monkeypatch.setattr(module, "is_fused", lambda *_: True)
    weight = any_weight(20, 576, FOUR, HALF)
    bias = torch.randn(40).half()[::2]
    for rows in (1, 3, 5, MOST_ROWS):
        x = torch.randn(rows, 576).half()
        for lies in (x, x.t().contiguous().t()):
            found = fused_product(lies, weight, bias)
            assert found is not None
            torch.testing.assert_close(found, expected_of(x, weight, bias), rtol=2e-3, atol=1e-3)
    assert fused_product(torch.randn(MOST_ROWS + 1, 576).half(), weight, None) is None
    assert fused_product(torch.randn(0, 576).half(), weight, None) is None
    monkeypatch.setattr(module, "is_fused", lambda *_: False)
    assert fused_product(torch.randn(1, 576).half(), weight, None) is None


@pytest.mark.usefixtures("pretended")
def test_a_kernel_is_used_once_its_numbers_are_right(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What compiles and says something else, what does not compile and what the driver refuses: one warning each, which
    says what is lost, and no error."""
    assert module._is_right(CPU, FOUR, HALF)
    assert not caplog.records

    def leaves_y_alone(device: torch.device, of: Variant) -> Any:
        return SimpleNamespace(launch=lambda *_: None)

    def refuses(device: torch.device, of: Variant) -> Kernel:
        raise CannotCompile("kernel.cu(3): error: no\nand more")

    def missing(device: torch.device, of: Variant) -> Kernel:
        return Kernel(b"", "product", 0)

    reasons = {leaves_y_alone: "WrongNumbers", refuses: "kernel.cu(3): error: no)", missing: CannotLaunch.__name__}
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    for made, reason in reasons.items():
        monkeypatch.setattr(module, "_made", made)
        forget()
        caplog.clear()
        assert not module._is_right(CPU, FOUR, HALF)
        assert not module._is_right(CPU, FOUR, HALF)
        [record] = caplog.records
        assert reason in record.getMessage()
        assert "unpacked before" in record.getMessage()


@pytest.mark.parametrize("codes", [FOUR, MXFP4, Compression(8, 24)], ids=str)
def test_no_variant_is_used_untried(codes: Codes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that are not whole were tried with 4 rows alone, of MXFP4 never; the others were compiled while somebody
    waited, and used whatever they said. What was tried was compiled and loaded again for use."""
    made: list[Variant] = []

    def noted(device: torch.device, of: Variant) -> Any:
        made.append(of)
        return SimpleNamespace(launch=lambda *_: None)

    monkeypatch.setattr(module, "_made", noted)
    monkeypatch.setattr(module, "require_close", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    forget()
    try:
        assert module._is_right(CPU, codes, HALF)
        tried = list(made)
        assert len(set(tried)) == len(tried)
        monkeypatch.setattr(module, "is_fused", lambda *_: True)
        for rows in range(1, MOST_ROWS + 1):
            for skipped, inputs in ((0, 192), (1, 192), (0, 480)):
                x, weight, bias = drawn(HALF, codes, rows, 5, inputs, skipped)
                assert fused_product(x, weight, bias) is not None
        assert made == tried
    finally:
        forget()


@pytest.mark.usefixtures("pretended")
def test_a_launch_that_is_refused_later_costs_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A launch that failed after the trial ended the run, though other operators could have made the product."""
    monkeypatch.setattr(module, "is_fused", lambda *_: True)
    asked: list[Variant] = []

    def refused(*_: Any) -> None:
        raise CannotLaunch("CUDA driver: too many resources requested for launch")

    def made(device: torch.device, of: Variant) -> Any:
        asked.append(of)
        return SimpleNamespace(launch=refused)

    monkeypatch.setattr(module, "_made", made)
    weight = any_weight(20, 576, FOUR, HALF)
    for _ in range(3):
        assert fused_product(torch.randn(2, 576).half(), weight, None) is None
    [record] = caplog.records
    assert "too many resources" in record.getMessage()
    assert len(asked) == 1


def test_where_there_are_no_such_products() -> None:
    for codes, dtype in ((Compression(3), HALF), (FOUR, torch.float64)):
        assert not is_fused(torch.device("cuda"), codes, dtype)
    assert not is_fused(CPU, FOUR, HALF)


def test_nvcc_compiles_the_text_for_a_t4(tmp_path: Path) -> None:
    """For the oldest architecture that CUDA 13 knows; without a register that would have to be kept in memory."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc: install CUDA, or pip install nvidia-cuda-nvcc")
    (tmp_path / "text.cu").write_text(Variant(HALF, 4, 64, False, True, 8).text)
    command = ["nvcc", "-std=c++17", "-arch=sm_75", "-cubin", "-Xptxas", "-v", "-o", "text.cubin", "text.cu"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in ran.stdout + ran.stderr
    assert (tmp_path / "text.cubin").read_bytes().startswith(b"\x7fELF")


def test_nvrtc_compiles_the_text_and_says_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time from the folder of builds."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    text = Variant(HALF, 4, 24, False, False, 1).text
    try:
        code = compiled(text, "sm_75")
    except CannotCompile as error:
        if "not on this machine" not in str(error):
            raise
        pytest.skip("no NVRTC: it comes with CUDA builds of torch, or pip install nvidia-cuda-nvrtc")
    assert code.startswith(b"\x7fELF")
    [kept] = (tmp_path / "flexgen_bench").iterdir()
    kept.write_bytes(b"what was kept")
    assert compiled(text, "sm_75") == b"what was kept"
    assert compiled(text, "sm_80") != b"what was kept"
    with pytest.raises(CannotCompile, match=r"kernel\.cu\(1\): error: identifier \"nothing\" is undefined"):
        compiled("__global__ void f() { nothing; }", "sm_75")
    with pytest.raises(CannotCompile, match="gpu-architecture"):
        compiled(text, "sm_7")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_device_says_what_the_reference_says(case: Case) -> None:
    x, weight, bias = drawn(*case)
    assert is_fused(torch.device("cuda"), weight.compression, x.dtype)
    there = QuantizedWeight(weight.codes.cuda(), weight.params.cuda(), weight.shape, weight.compression, weight.dtype)
    for given in (bias, None):
        found = fused_product(x.cuda(), there, given if given is None else given.cuda())
        assert found is not None
        torch.testing.assert_close(found.cpu(), expected_of(x, weight, given), rtol=TOLERANCE[x.dtype], atol=1e-3)
