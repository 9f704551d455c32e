"""MXFP4: the values of transformers, and products with them, whichever way they are computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexgen_bench.core.microscaling import MXFP4
from flexgen_bench.kernels import ops
from flexgen_bench.kernels.microscaling import repacked
from flexgen_bench.kernels.native import build
from flexgen_bench.kernels.quantization import QuantizedWeight

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["native", "torch"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(build.SWITCH, "0" if request.param == "torch" else "1")
    return str(request.param)


def stack(experts: int, outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Blocks and scales as checkpoints have them, with every code."""
    generator = torch.Generator().manual_seed(seed)
    groups = inputs // MXFP4.group_size
    blocks = torch.randint(0, 256, (experts, outputs, groups, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(118, 130, (experts, outputs, groups), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_values_are_those_of_transformers(dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = stack(2, 30, 96)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    for expert in range(2):
        weight = QuantizedWeight(repacked(blocks[expert]), scales[expert], (30, 96), MXFP4, dtype)
        assert torch.equal(weight.dequantize(), expected[expert])
        assert torch.equal(weight.rows(7, 19), expected[expert][7:19])


def test_every_scale(path: str) -> None:
    """From 2^-127, which is no normal number, to the largest with which 6 is a number yet."""
    scales = torch.arange(253, dtype=torch.uint8)[:, None]
    codes = torch.arange(16, dtype=torch.uint8).repeat(253, 1)  # the values 0 .. 15, and sixteen times 0
    weight = QuantizedWeight(codes, scales, (253, 32), MXFP4, torch.float32)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    expected = torch.cat((table, -table, torch.zeros(16, dtype=torch.float64))) * 2.0 ** (scales.double() - 127)
    assert torch.equal(weight.dequantize().double(), expected)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 70])
def test_products(rows: int, dtype: torch.dtype) -> None:
    """Of few rows of x and of many, of inputs that end within what is unpacked at once."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for inputs in (32, 160, 672):
        blocks, scales = stack(1, 53, inputs, seed=inputs)
        weight = QuantizedWeight(repacked(blocks[0]), scales[0], (53, inputs), MXFP4, dtype)
        x, bias = torch.randn(rows, inputs).to(dtype), torch.randn(53).to(dtype)
        exact = x.double() @ weight.dequantize().double().T + bias.double()
        torch.testing.assert_close(
            ops.linear(x, weight, bias).double(), exact, atol=tolerance * float(exact.abs().max()), rtol=tolerance
        )
