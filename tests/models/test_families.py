"""Every family says what transformers says, on every tier, attention site, schedule and chunking, with what only some
families have: ALiBi, windows, soft caps, norms in other places, heads rotated in part."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import AttentionSite, Offloaded, Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.kernels.native import build
from flexgen_bench.schedule.prefix_tree import ScoreRequest
from tests.engine.test_engine_tokens import (
    GPU_MIXES,
    HOST_MIXES,
    Reference,
    check_allocated_as_planned,
    on,
    random_policy,
    reference_of,
    run,
    until,
)
from tests.engine.test_shared_prompts import prompts_with
from tests.kernels.test_lossy_attention import fake_quantized_cache
from tests.support.tiny_models import EMULATED, FAMILIES, HOST, greedy_reference, random_model, random_prompts, save

LENGTHS = [1, 30, 2, 9, 9, 17, 5]
FOUR_BITS = Compression(4, 8)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference_of(request.param, random_prompts(LENGTHS), tmp_path_factory.mktemp(request.param))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("attention", AttentionSite)
@pytest.mark.parametrize("kv", GPU_MIXES, ids=["gpu", "cpu", "disk", "thirds", "gpu+disk"])
def test_the_cache_on_any_tier(reference: Reference, kv: Any, attention: AttentionSite, tmp_path: Path) -> None:
    policy = Policy(2, 3, on(Tier.CPU), kv, on(Tier.GPU), attention=attention)
    assert run(reference, policy, EMULATED, tmp_path)[0] == reference.tokens


@pytest.mark.one_in(5)
@pytest.mark.parametrize("kv", HOST_MIXES, ids=["cpu", "disk", "mixed"])
@pytest.mark.parametrize("native", ["1", "0"], ids=["native", "torch"])
def test_without_accelerator(
    reference: Reference, kv: Any, native: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(build.SWITCH, native)
    policy = Policy(3, 2, kv, kv, kv, prefill_chunk=7)
    assert run(reference, policy, HOST, tmp_path)[0] == reference.tokens


@pytest.mark.one_in(4)
@pytest.mark.parametrize("seed", range(5))
def test_random_policies(reference: Reference, seed: int, tmp_path: Path) -> None:
    """Some sequences end early; what the plan counts is what is allocated."""
    rng = random.Random(f"{reference.weights.shape.family}{seed}")
    hardware = rng.choice([HOST, EMULATED, EMULATED])
    policy = random_policy(rng, hardware)
    stop = {i: t[rng.randrange(9)] for i, t in enumerate(reference.tokens) if rng.random() < 0.3}
    found, result = run(reference, policy, hardware, tmp_path, stop=stop)
    assert found == [until(ids, stop.get(i)) for i, ids in enumerate(reference.tokens)], policy
    check_allocated_as_planned(result, hardware)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, PackedWeights]:
    made, folder = random_model(request.param), tmp_path_factory.mktemp(request.param)
    checkpoint = save(made, folder / "ckpt")
    return made, PackedWeights.from_checkpoint(checkpoint, DType.FLOAT32, folder / "cache")


def test_what_prompts_share_is_computed_once(model: tuple[Any, PackedWeights], tmp_path: Path) -> None:
    made, weights = model
    prompts = prompts_with(14, [1, 22, 2, 9, 9, 5])
    same = Reference(weights, prompts, greedy_reference(made, prompts, 9))
    for chunk in (None, 5):
        policy = Policy(3, 2, on(Tier.CPU), on(Tier.CPU), on(Tier.CPU), prefill_chunk=chunk)
        assert run(same, policy, EMULATED, tmp_path)[0] == same.tokens


def test_a_compressed_cache(model: tuple[Any, PackedWeights], tmp_path: Path) -> None:
    """Holds what one holds in transformers that is quantized on its way in."""
    made, weights = model
    prompts = random_prompts(LENGTHS)
    expected = greedy_reference(made, prompts, 9, lambda: fake_quantized_cache(FOUR_BITS))
    same = Reference(weights, prompts, expected)
    rng = random.Random(weights.shape.family)
    for hardware in (HOST, EMULATED, EMULATED):
        policy = random_policy(rng, hardware, Lossy(kv_cache=FOUR_BITS))
        assert run(same, policy, hardware, tmp_path)[0] == expected, policy


@pytest.mark.one_in(5)
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_scores_are_those_of_transformers(model: tuple[Any, PackedWeights], share: float, tmp_path: Path) -> None:
    """Continuations that branch off behind what they share; sparse attention gives those of decoding the same
    tokens."""
    made, weights = model
    begin, *ends = random_prompts([19, 3, 11, 6], seed=1)
    requests = [ScoreRequest([*begin, *end], len(begin)) for end in ends]
    for chunk in (None, 4):
        scores: dict[int, list[tuple[float, bool]]] = {}
        policy = Policy(
            2,
            2,
            on(Tier.CPU),
            on(Tier.CPU),
            on(Tier.CPU),
            prefill_chunk=chunk,
            offloaded=Offloaded.IN_PLACE,
            lossy=Lossy(value_share=share),
        )
        engine = weights.engine(policy, Device.open(EMULATED, 1), tmp_path)
        engine.score(requests, scores.__setitem__)
        engine.close()
        if share < 1:
            assert all(torch.isfinite(torch.tensor([p for p, _ in found])).all() for found in scores.values())
            continue
        for i, request in enumerate(requests):
            with torch.no_grad():
                logits = made(torch.tensor([request.tokens])).logits[0].log_softmax(-1)
            expected = [float(logits[t - 1, request.tokens[t]]) for t in range(request.start, len(request.tokens))]
            assert [p for p, _ in scores[i]] == pytest.approx(expected, abs=2e-4)
