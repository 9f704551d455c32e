"""Formulas that are traced: the same results from one flat list of operators, and the formula itself where that cannot
be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexgen_bench.core.model import ModelShape
from flexgen_bench.engine.layers import Formulas
from flexgen_bench.kernels import formula, ops
from flexgen_bench.models import formulas
from flexgen_bench.models.registry import family
from tests.support.shapes import llama_shape, opt_shape

SHAPES: dict[str, Callable[[], ModelShape]] = {
    "opt": opt_shape,
    "opt, norms after": lambda: opt_shape(norm_before=False),
    "opt, no bias": lambda: opt_shape(bias=False, activation="gelu"),
    "opt, norms without weights": lambda: opt_shape(norm_affine=False),
    "llama": llama_shape,
    "llama, biases": lambda: llama_shape(attention_bias=True, mlp_bias=True),
    "experts": lambda: mixture("mixtral"),
    "experts, dense layers": lambda: mixture("qwen3_moe", dense_layers=[0]),
    "experts beside an MLP": lambda: mixture("glm4_moe", shared_size=20),
    "experts beside a gated MLP": lambda: mixture("qwen2_moe", shared_size=20),
}


def mixture(kind: str, **options: Any) -> ModelShape:
    """Llama's shape with experts."""
    counts = {"experts": 5, "experts_per_token": 2, "expert_size": 28, "renormalised": False, "norm_eps": 1e-6}
    return replace(llama_shape(), family=kind, options=counts | options)


def layer_weights(shape: ModelShape) -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = family(shape.family).inventory(shape).layers[0]
    return {t.spec.name: torch.randn(t.spec.shape) / t.spec.shape[-1] ** 0.5 for t in tensors}


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_traced_layers_compute_what_their_formulas_say(name: str, lower: bool) -> None:
    """And leave what they are given as it is: hidden states before a layer may be wanted again."""
    shape = SHAPES[name]()
    of, w = family(shape.family), layer_weights(shape)
    decoder = of.decoder(shape)
    layer = Formulas(of, shape).layer(0, w, lower)
    x, attended = (torch.randn(5, shape.hidden_size), torch.randn(5, shape.num_heads * shape.head_dim))
    before = x.clone()
    angles = formulas.angles(ops, decoder, torch.arange(5), torch.arange(5) + 1, x)
    first = decoder.layers[0]
    expected = (*formulas.project(ops, decoder, first, w, x, angles), formulas.output(ops, first, w, x, attended))
    found = (*layer.project(x, angles), layer.output(x, attended))
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


def operators(traced: formula.Traced | None) -> list[str]:
    """What a traced formula calls, in order."""
    assert traced is not None
    seen: list[str] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func._schema.name.split("::")[1])
            return func(*args, **(kwargs or {}))

    given = {"w": torch.randn(4, 3), "b": torch.randn(4), "s": torch.randn(3, 4)}
    x = torch.randn(2, 3)
    with torch.inference_mode(), Record():
        traced.bind(given)(x)
    return [name for name in seen if name != "t"]


WEIGHTS = {"w": (4, 3), "b": (4,), "s": (3, 4)}
LOWERED: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "a product with its bias": (lambda o, w, x: o.linear(x, w["w"], w["b"]), ["addmm"]),
    "a product without": (lambda o, w, x: o.linear(x, w["w"]), ["mm"]),
    "an activation in the epilogue": (
        lambda o, w, x: o.activation("relu", o.linear(x, w["w"], w["b"])),
        ["_addmm_activation"],
    ),
    "another activation": (lambda o, w, x: o.activation("gelu", o.linear(x, w["w"], w["b"])), ["addmm", "gelu"]),
    "a sum with what was given is made anew": (
        lambda o, w, x: x + o.linear(o.linear(x, w["w"]), w["s"]),
        ["mm", "addmm"],
    ),
    "a sum with what was made here is written to": (
        lambda o, w, x: (x + o.linear(o.linear(x, w["w"]), w["s"])) + o.linear(o.linear(x, w["w"]), w["s"]),
        ["mm", "addmm", "mm", "addmm_"],
    ),
    "a product that is used twice stays": (
        lambda o, w, x: (y := o.linear(x, w["w"])) + o.linear(o.linear(y, w["s"]), w["w"]),
        ["mm", "mm", "addmm"],
    ),
}


@pytest.mark.parametrize("case", LOWERED)
def test_operators_are_joined_where_torch_has_one_for_several(case: str) -> None:
    written, expected = LOWERED[case]
    traced = formula.trace(written, WEIGHTS, ("x",), lower=True)
    assert operators(traced) == expected
    given = {name: torch.randn(dims) for name, dims in WEIGHTS.items()}
    x = torch.randn(2, 3)
    assert traced is not None
    torch.testing.assert_close(traced.bind(given)(x), written(ops, given, x))


def test_a_sum_that_is_wanted_again_is_not_written_to() -> None:
    def twice(o: Any, w: Any, x: Any) -> Any:
        first = x + o.linear(o.linear(x, w["w"]), w["s"])
        return (first + o.linear(o.linear(x, w["w"]), w["s"])) * first

    traced = formula.trace(twice, WEIGHTS, ("x",), lower=True)
    assert traced is not None
    given = {name: torch.randn(dims) for name, dims in WEIGHTS.items()}
    x = torch.randn(2, 3)
    torch.testing.assert_close(traced.bind(given)(x), twice(ops, given, x))


def test_a_view_of_a_sum_keeps_it_from_being_written_to() -> None:
    """The view is made before, and looked at after."""

    def seen_later(o: Any, w: Any, x: Any) -> Any:
        first = x + o.linear(o.linear(x, w["w"]), w["s"])
        view = first.view(-1, 3)
        return (first + o.linear(o.linear(x, w["w"]), w["s"])) * view

    traced = formula.trace(seen_later, WEIGHTS, ("x",), lower=True)
    assert traced is not None
    given = {name: torch.randn(dims) for name, dims in WEIGHTS.items()}
    x = torch.randn(2, 3)
    torch.testing.assert_close(traced.bind(given)(x), seen_later(ops, given, x))


def test_a_formula_that_looks_at_values_is_called_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = llama_shape()
    of, w = family("llama"), layer_weights(shape)

    def choosy(ops: Any, layer: Any, w: Any, x: Tensor, attended: Tensor) -> Tensor:
        return x if x.sum() > 0 else attended

    def counting(ops: Any, shape: ModelShape, w: Any, x: Tensor) -> Tensor:
        return x * len(x)

    monkeypatch.setattr(formulas, "output", choosy)
    assert formula.trace(lambda o, w, *xs: counting(o, shape, w, *xs), {}, ("x",), True) is None
    assert formula.trace(lambda o, w, *xs: choosy(o, shape, w, *xs), {}, ("x", "y"), True) is None
    layer = Formulas(of, shape).layer(0, w, lower=True)
    ones = torch.ones(2, shape.hidden_size)
    assert layer.output(ones, -ones) is ones
    assert torch.equal(layer.output(-ones, ones), ones)


def test_a_formula_that_lowering_does_not_suit_stays_unlowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is added to every row of a product: as one operator on the accelerator that would have the shape of the
    row."""
    shape = opt_shape()
    of, w = family("opt"), layer_weights(shape)

    def odd(ops: Any, layer: Any, w: Any, x: Tensor, attended: Tensor) -> Tensor:
        return x.mean(0) + ops.linear(attended, w["out.weight"], w["out.bias"])

    monkeypatch.setattr(formulas, "output", odd)
    layer = Formulas(of, shape).layer(0, w, lower=True)
    x = torch.randn(3, shape.hidden_size)
    torch.testing.assert_close(layer.output(x, x), odd(ops, shape, w, x, x))


def test_quantized_weights_are_not_transposed() -> None:
    """They are no tensors: products with them stay as ``ops.linear`` knows them."""
    from flexgen_bench.core.compression import Compression
    from flexgen_bench.kernels.quantization import QuantizedWeight

    shape = opt_shape()
    w: dict[str, Any] = dict(layer_weights(shape))
    w["up.weight"] = QuantizedWeight.of(w["up.weight"], Compression(8))
    layer = Formulas(family("opt"), shape).layer(0, w, lower=True)
    x = torch.randn(3, shape.hidden_size)
    torch.testing.assert_close(
        layer.output(x, x), formulas.output(ops, family("opt").decoder(shape).layers[0], w, x, x)
    )
