"""Compressed KV caches and sparse attention: the same tokens as transformers with a cache that holds the same
numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import to_full_length
from flexgen_bench.kernels.quantization import fake_quantize
from tests.support.tiny_models import EMULATED, HOST, MODELS, greedy_reference, random_model, random_prompts, save

NEW_TOKENS = 9
LENGTHS = [1, 30, 2, 9, 17, 5]
NAMES = ["opt", "llama-tied-grouped", "llama-multi-query"]


def fake_quantized_cache(compression: Compression | None) -> Any:
    """transformers' cache, except that keys and values are quantized on their way in: all attention sees what it
    holds."""
    from transformers import DynamicCache

    class Quantized(DynamicCache):
        def update(self, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
            if compression is not None:
                k, v = fake_quantize(k, compression), fake_quantize(v, compression)
            return super().update(k, v, *args, **kwargs)

    return Quantized()


def sparse_attention(share: float) -> Any:
    """Attention for transformers that uses, of each head in decode, only the heaviest value rows and the last one."""

    def attend(
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        scaling: Any = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
        scores = query @ key.transpose(2, 3) * scaling
        rows, tokens = scores.shape[-2:]
        causal = torch.ones(rows, tokens, dtype=torch.bool).tril(tokens - rows)
        weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
        if rows == 1:
            kept = max(1, math.ceil(share * tokens))
            chosen = weights[..., :-1].topk(min(kept - 1, tokens - 1), dim=-1).indices
            mask = torch.zeros_like(weights).scatter(-1, chosen, 1.0)
            mask[..., -1] = 1
            weights = weights * mask
        return (weights @ value).transpose(1, 2).contiguous(), None

    return attend


def reference(model: Any, prompts: Sequence[Sequence[int]], compression: Compression | None) -> list[list[int]]:
    return greedy_reference(model, prompts, NEW_TOKENS, lambda: fake_quantized_cache(compression))


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, PackedWeights]:
    folder = tmp_path_factory.mktemp(request.param)
    made = random_model(request.param)
    weights = PackedWeights.from_checkpoint(save(made, folder / "ckpt"), DType.FLOAT32, folder / "cache")
    return request.param, made, weights


def run(
    weights: PackedWeights, policy: Policy, hardware: HardwareProfile, folder: Path, prompts: Sequence[Sequence[int]]
) -> list[list[int]]:
    engine = weights.engine(policy, Device.open(hardware, 1), folder)
    params = SamplingParams(max_tokens=NEW_TOKENS)
    sequences = to_full_length(prompts, params)
    try:
        engine.generate(sequences)
    finally:
        engine.close()
    return [s.new for s in sequences]


def random_policy(rng: random.Random, hardware: HardwareProfile, lossy: Lossy) -> Policy:
    def placement() -> Placement:
        shares = [rng.choice([0, 0, 1, 2]) for _ in hardware.tiers]
        total = sum(shares)
        if not total:
            return Placement.all_on(rng.choice(hardware.tiers))
        return Placement(**{str(t): n / total for t, n in zip(hardware.tiers, shares, strict=True)})

    return Policy(
        gpu_batch_size=rng.choice([1, 2, 4]),
        num_gpu_batches=rng.choice([1, 2, 3]),
        weights=placement(),
        kv_cache=placement(),
        activations=placement(),
        attention=rng.choice(list(AttentionSite)),
        schedule=rng.choice(list(Schedule)),
        prefill_chunk=rng.choice([None, 3, 16]),
        offloaded=rng.choice(list(Offloaded)),
        lossy=lossy,
    )


@pytest.mark.parametrize(
    "compression",
    [Compression(8), Compression(4), Compression(4, 8), Compression(3, 16)],
    ids=lambda c: f"{c.bits}bit/{c.group_size}",
)
def test_a_compressed_cache_holds_what_a_fake_quantized_one_holds(
    model: tuple[str, Any, PackedWeights], compression: Compression, tmp_path: Path
) -> None:
    """On every tier, moved or attended where it lies, whatever the schedule and the chunks."""
    name, made, weights = model
    prompts = random_prompts(LENGTHS)
    expected = reference(made, prompts, compression)
    rng = random.Random(f"{name}{compression}")
    for hardware in (HOST, EMULATED, EMULATED):
        policy = random_policy(rng, hardware, Lossy(kv_cache=compression))
        assert run(weights, policy, hardware, tmp_path, prompts) == expected, policy


@pytest.mark.parametrize("compression", [None, Compression(4, 8)], ids=["plain", "4bit"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_sparse_attention_uses_the_heaviest_values(
    model: tuple[str, Any, PackedWeights], share: float, compression: Compression | None, tmp_path: Path
) -> None:
    """With compressed and mixed caches too, which the original refuses."""
    from transformers import AttentionInterface

    name, made, weights = model
    AttentionInterface.register("heaviest_values", sparse_attention(share))
    prompts = random_prompts(LENGTHS)
    made.set_attn_implementation("heaviest_values")
    try:
        expected = reference(made, prompts, compression)
    finally:
        made.set_attn_implementation("sdpa")
    rng = random.Random(f"{name}{share}{compression}")
    for hardware in (HOST, EMULATED, EMULATED):
        policy = random_policy(rng, hardware, Lossy(kv_cache=compression, value_share=share))
        assert run(weights, policy, hardware, tmp_path, prompts) == expected, policy


@pytest.mark.parametrize("name", sorted(MODELS))
def test_compressed_weights_and_cache_together(name: str, tmp_path: Path) -> None:
    compression = Compression(4, 16)
    made = random_model(name)
    weights = PackedWeights.from_checkpoint(
        save(made, tmp_path / "ckpt"), DType.FLOAT32, tmp_path / "cache", compression=compression
    )
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if parameter.dim() == 2 and "positions" not in key:
                per_token = "embed_tokens" in key or "lm_head" in key
                how = compression.of_vocabulary if per_token else compression
                parameter.copy_(fake_quantize(parameter, how))
    prompts = random_prompts(LENGTHS)
    expected = reference(made, prompts, compression)
    rng = random.Random(name)
    lossy = Lossy(weights=compression, kv_cache=compression)
    for hardware in (HOST, EMULATED):
        policy = random_policy(rng, hardware, lossy)
        assert run(weights, policy, hardware, tmp_path, prompts) == expected, policy
