"""Formulas as programs of native calls: what the formulas say, for every kind of part, and nothing else recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flexgen_bench.core.compression import Compression
from flexgen_bench.core.model import ModelShape
from flexgen_bench.kernels import ops, program
from flexgen_bench.kernels.quantization import QuantizedWeight
from flexgen_bench.models import formulas
from flexgen_bench.models.registry import family
from tests.support.shapes import llama_shape, opt_shape

SHAPES: dict[str, Callable[[], ModelShape]] = {
    "opt": opt_shape,
    "opt, norms after": lambda: opt_shape(norm_before=False),
    "opt, no bias, gelu": lambda: opt_shape(bias=False, activation="gelu"),
    "opt, norms without weights": lambda: opt_shape(norm_affine=False, activation="gelu_new"),
    "llama": llama_shape,
    "llama, biases": lambda: llama_shape(attention_bias=True, mlp_bias=True),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

pytestmark = pytest.mark.skipif(program._functions() is None, reason="no native library can be built here")


def layer_weights(shape: ModelShape, dtype: torch.dtype, packed: bool = False) -> dict[str, Tensor | QuantizedWeight]:
    made: dict[str, Tensor | QuantizedWeight] = {}
    for tensor in family(shape.family).inventory(shape).layers[0]:
        size = tensor.spec.shape
        values = (torch.randn(size) / size[-1] ** 0.5).to(dtype)
        made[tensor.spec.name] = QuantizedWeight.of(values, Compression(4)) if packed and len(size) == 2 else values
    return made


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("name", SHAPES)
def test_programs_compute_what_formulas_say(name: str, packed: bool, dtype: torch.dtype) -> None:
    """At once and again with other inputs, for several numbers of rows that share their buffers."""
    torch.manual_seed(0)
    shape = SHAPES[name]()
    decoder = family(shape.family).decoder(shape)
    layer, w = decoder.layers[0], layer_weights(shape, dtype, packed)
    buffers = program.Buffers(9)
    for rows in (9, 5, 4) if dtype is torch.float32 else (1, 9, 2):
        x, attended = (torch.randn(rows, n).to(dtype) for n in (shape.hidden_size, shape.num_heads * shape.head_dim))
        angles = formulas.angles(ops, decoder, torch.arange(rows) * 7, torch.arange(rows) * 7 + 1, x)

        def project(ops: object, w: dict[str, Tensor], x: Tensor, tables: object) -> object:
            return formulas.project(ops, decoder, layer, w, x, tables)

        def output(ops: object, w: dict[str, Tensor], x: Tensor, attended: Tensor) -> object:
            return formulas.output(ops, layer, w, x, attended)

        first = program.record(project, w, (x, angles), buffers)
        assert first is not None
        second = program.record(output, w, (x, attended), buffers, first[1])
        assert second is not None
        for change in (1, -2):
            expected = (*project(ops, w, x * change, angles), output(ops, w, x * change, attended))
            first[0].inputs[0].copy_(x * change)
            for own, given in zip(first[0].inputs[1], angles, strict=True):
                own[0].copy_(given[0])
                own[1].copy_(given[1])
            first[0].run()
            second[0].inputs[0].copy_(x * change)
            second[0].inputs[1].copy_(attended)
            second[0].run()
            for mine, its in zip((*first[0].outputs, second[0].outputs), expected, strict=True):
                torch.testing.assert_close(mine, its, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 2)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rotations_round_where_torch_does(dtype: torch.dtype, interleaved: bool) -> None:
    """Of a share of the head, with heads that lie among others. Bit for bit, but for sums that torch fuses or does
    not."""
    table = ops.rotary_table(torch.arange(3), torch.arange(3) + 1, 8, 100.0, None, dtype, interleaved)
    x = torch.randn(3, 5, 12).to(dtype)

    def formula(ops: object, w: object, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        return ops.rotate(x[:, 1:4], *table, interleaved)  # type: ignore[attr-defined]

    made = program.record(formula, {}, (x, table), program.Buffers(3))
    assert made is not None
    for own, given in zip((made[0].inputs[0], *made[0].inputs[1]), (x, *table), strict=True):
        own.copy_(given)
    made[0].run()
    torch.testing.assert_close(made[0].outputs, formula(ops, {}, x, table), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(
    "formula",
    [
        lambda ops, w, x: x - 1,
        lambda ops, w, x: x.t().reshape(-1),
        lambda ops, w, x: ops.activation("relu2", x),
        lambda ops, w, x: ops.soft_capped(x, 3.0),
        lambda ops, w, x: x.add_(x),
        lambda ops, w, x: torch.cat((x, x)),
        lambda ops, w, x: x + 1,
        lambda ops, w, x: ops.activation("silu", x.float()),
    ],
)
def test_what_has_no_native_call_is_not_recorded(formula: Callable[..., Tensor]) -> None:
    """Also what looks like a view and is a copy: it would hold what a buffer held when it was recorded."""
    assert program.record(formula, {}, (torch.ones(2, 6, dtype=torch.bfloat16),), program.Buffers(2)) is None
