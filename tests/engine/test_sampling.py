"""Sampling against the logits processors of transformers, and its statistics."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.sampling import Sampler, _filtered, _penalise


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (10, 0.5), (200, 0.99), (1, 0.1)])
def test_filters_keep_what_transformers_keeps(top_k: int, top_p: float) -> None:
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    for seed in range(20):
        logits = torch.randn(97, generator=torch.Generator().manual_seed(seed)) * 3
        theirs = logits[None].clone()
        if top_k:
            theirs = TopKLogitsWarper(top_k)(None, theirs)
        if top_p < 1:
            theirs = TopPLogitsWarper(top_p)(None, theirs)
        assert torch.allclose(_filtered(logits, top_k, top_p), theirs.softmax(-1)[0], atol=1e-6)


def test_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits, seen = torch.randn(50), [3, 7, 7, 41]
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), logits[None].clone())[0]
    assert torch.equal(_penalise(logits, set(seen), 1.3), theirs)


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampler = Sampler(SamplingParams(temperature=1.0, seed=3), [], 0)
    counts = Counter(sampler.choose(logits) for _ in range(4000))
    for token, probability in enumerate(logits.softmax(-1).tolist()):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_streams_of_neighbouring_prompts_and_seeds_differ() -> None:
    logits = torch.zeros(1000)
    draws = {
        (seed, stream): tuple(
            Sampler(SamplingParams(temperature=1.0, seed=seed), [], stream).choose(logits) for _ in range(1)
        )
        for seed in range(5)
        for stream in range(20)
    }
    assert len(set(draws.values())) > 85


@pytest.mark.parametrize("penalty", [1e-300, 1e-20, 1.0, 1e20, 1e308])
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-20, 1e308])
def test_extreme_values_choose_a_token(temperature: float, penalty: float) -> None:
    """A request with a temperature of 1e-300 made the probabilities NaN, and the pass that it shared with others failed
    for all of them."""
    logits = torch.tensor([0.0, 40.0, -40.0, 39.0, 0.0])
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty)
    token = Sampler(params, [0, 2], 0).choose(logits)
    if temperature < 1 <= penalty:
        assert token == 1


def test_greedy_ignores_the_seed() -> None:
    logits = torch.randn(40)
    chosen = {Sampler(SamplingParams(seed=s), [], s).choose(logits) for s in range(5)}
    assert chosen == {int(logits.argmax())}
