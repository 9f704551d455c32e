"""Activations in 8 bits beside 4-bit weights: products, whole models against transformers, and where they are
refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.compression import Along, Compression, Lossy
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import to_full_length
from flexgen_bench.kernels import ops
from flexgen_bench.kernels.eight_bit import in_eighths
from flexgen_bench.kernels.quantization import QuantizedWeight, fake_quantize
from flexgen_bench.planner.search_space import permitted
from tests.support.tiny_models import EMULATED, HOST, greedy_reference, random_model, random_prompts, save

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FOUR = Compression(4, 16)
LOSSY = Lossy(weights=FOUR, activations=8)


def by_definition(x: Tensor, weight: QuantizedWeight, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(product, sum of magnitudes) in float64, from the formula of kernels/native/code_products.h group by group."""
    size, inputs = weight.compression.group_size, weight.shape[1]
    values = weight.rows(0, weight.shape[0], dtype=torch.float32).double()
    y = bias.double().expand(x.shape[0], -1).clone()
    magnitude = y.abs()
    for start in range(0, inputs, size):
        part = x[:, start : start + size].float()
        largest = part.abs().amax(dim=1, keepdim=True)
        codes = torch.where(largest > 0, (part * (torch.full_like(largest, 127) / largest)).round(), 0.0)
        found = codes.double() * (largest / 127).double()
        w = values[:, start : start + size].t()
        y, magnitude = y + found @ w, magnitude + found.abs() @ w.abs()
    return y, magnitude


@pytest.mark.parametrize("switch", ["0", "1"])
@pytest.mark.parametrize("dtype", sorted(ROUNDING, key=str), ids=str)
@pytest.mark.parametrize("size", [64, 32, 24, 128])
def test_products(size: int, dtype: torch.dtype, switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native and with torch, for few rows and many, last groups that are not full, and groups of zeros."""
    monkeypatch.setenv("FLEXGEN_NATIVE", switch)
    for outputs, inputs in ((1, 1), (97, 40), (150, 523), (60, 1088)):
        plain = QuantizedWeight.of((torch.randn(outputs, inputs) * 0.1).to(dtype), Compression(4, size))
        weight = replace(plain, activations=8)
        bias = torch.randn(outputs).to(dtype)
        for rows in (1, 2, 3, 5, 8, 9, 17, 33, 70, 300):
            x = torch.randn(rows, inputs).to(dtype)
            x[0, : inputs // 2] = 0
            y = ops.linear(x, weight, bias)
            exact, magnitude = by_definition(x, weight, bias)
            allowed = exact.abs() * ROUNDING[dtype] * 1.01 + 2e-6 * magnitude + 1e-7
            assert y.dtype == dtype
            assert bool(((y.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("switch", ["0", "1"])
@pytest.mark.parametrize("rows", [2, 20])
def test_what_is_not_finite_stays_so(rows: int, switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes hold numbers only, so a group with anything else has a scale that is none, and whoever checks results sees
    it."""
    monkeypatch.setenv("FLEXGEN_NATIVE", switch)
    weight = replace(QuantizedWeight.of(torch.randn(80, 256), Compression(4)), activations=8)
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.randn(rows, 256)
        x[1, 70] = value
        y = ops.linear(x, weight, None)
        assert not bool(y[1].isfinite().any())
        assert bool(y[0].isfinite().all())


def quantized_inputs(model: Any) -> Any:
    """The model on fake-quantized weights, its layers' products taking their inputs in 8 bits."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            head = "lm_head" in name
            how = FOUR.of_vocabulary if head else FOUR
            with torch.no_grad():
                module.weight.copy_(fake_quantize(module.weight, how))
            if not head:
                module.register_forward_pre_hook(
                    lambda _, inputs: (in_eighths(inputs[0].flatten(0, -2), 16).view_as(inputs[0]),)
                )
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        if table is not model.get_output_embeddings().weight:  # a tied one is done
            table.copy_(fake_quantize(table, FOUR.of_vocabulary))
    return model


@pytest.mark.parametrize("switch", ["0", "1"])
@pytest.mark.parametrize("tier", [Tier.CPU, Tier.DISK])
def test_tokens_are_those_of_transformers(
    tier: Tier, switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXGEN_NATIVE", switch)
    name = _models()[0]
    prompts = random_prompts([1, 12, 3, 7])
    folder = save(random_model(name), tmp_path / "model")
    expected = greedy_reference(quantized_inputs(random_model(name)), prompts, 6)
    weights = PackedWeights.from_checkpoint(folder, DType.FLOAT32, tmp_path / "cache", compression=FOUR)
    cpu = Placement.all_on(Tier.CPU)
    policy = Policy(2, 2, Placement.all_on(tier), cpu, cpu, lossy=LOSSY)
    engine = weights.engine(policy, Device.open(HOST, 1), tmp_path)
    sequences = to_full_length(prompts, SamplingParams(max_tokens=6))
    try:
        engine.generate(sequences)
    finally:
        engine.close()
    assert [s.new for s in sequences] == expected
    assert "8-bit activations" in str(engine.policy.lossy)


def test_accelerators_refuse_it(tmp_path: Path) -> None:
    """Weights that are moved there are unpacked first: the choice would have been ignored."""
    folder = save(random_model(_models()[0]), tmp_path / "model")
    weights = PackedWeights.from_checkpoint(folder, DType.FLOAT32, tmp_path / "cache", compression=FOUR)
    with pytest.raises(UserError, match="activations") as caught:
        weights.engine(Policy(lossy=LOSSY), Device.open(EMULATED, 1), tmp_path)
    assert "gpu=cpu" in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "bits"),
    [
        (None, 8),
        (Compression(8), 8),
        (Compression(3), 8),
        (Compression(4, 64, Along.OUTPUTS), 8),
        (FOUR, 4),
        (FOUR, True),
    ],
    ids=str,
)
def test_other_choices_are_refused(weights: Compression | None, bits: int) -> None:
    with pytest.raises(UserError, match="activations"):
        Lossy(weights=weights, activations=bits)


def test_records_without_it_are_as_before() -> None:
    """What identifies a cell is made of this: a new key with a usual value would have made all cells new ones."""
    assert "activations" not in to_json(Lossy(weights=FOUR))
    assert from_json(Lossy, to_json(LOSSY), "lossy") == LOSSY
    assert from_json(Lossy, to_json(Lossy(weights=FOUR)), "lossy") == Lossy(weights=FOUR)
    assert LOSSY.changed == ("weights", "activations")
    # A planner that may compress weights may also leave them as they are, and then has nothing to multiply codes with.
    both = replace(LOSSY, kv_cache=Compression(8))
    assert Lossy(kv_cache=Compression(8)) in permitted(both)


def _models() -> list[str]:
    from tests.support.tiny_models import MODELS

    return sorted(name for name in MODELS if name.startswith("llama"))
