"""What prompts begin with alike is computed once per micro-batch, and nothing else changes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.engine import generation
from flexgen_bench.engine.generation import requests_of, to_full_length
from flexgen_bench.schedule.sequence_groups import Request
from tests.engine.test_engine_tokens import Reference, on, random_policy, reference_of, run, until
from tests.support.tiny_models import EMULATED, HOST, MODELS, VOCAB

SHARED = 14


def prompts_with(shared: int, tails: list[int], seed: int = 0) -> list[list[int]]:
    """The tails begin with different tokens, so that exactly ``shared`` are shared."""
    rng = random.Random(seed)
    start = [rng.randrange(4, VOCAB) for _ in range(shared)]
    return [[*start, 4 + i, *(rng.randrange(4, VOCAB) for _ in range(n - 1))] for i, n in enumerate(tails)]


@pytest.fixture(scope="module", params=sorted(MODELS))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    prompts = prompts_with(SHARED, [1, 30, 2, 9, 9, 17, 5])
    return reference_of(request.param, prompts, tmp_path_factory.mktemp(request.param))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("seed", range(12))
def test_tokens_are_those_of_transformers(reference: Reference, seed: int, tmp_path: Path) -> None:
    """Any placement, batch shape, schedule and chunking; chunks end before, in and behind what is shared; some
    sequences end early, the first ones of a sequence group among them. What is planned is what is allocated."""
    rng = random.Random(f"{reference.weights.shape.name}{seed}")
    hardware = rng.choice([HOST, EMULATED])
    policy = random_policy(rng, hardware)
    stop = {i: ids[rng.randrange(9)] for i, ids in enumerate(reference.tokens) if rng.random() < 0.3}
    found, result = run(reference, policy, hardware, tmp_path, stop=stop)
    assert found == [until(ids, stop.get(i)) for i, ids in enumerate(reference.tokens)], policy
    assert result.plan is not None
    groups = result.plan.groups
    of_several = [g for g in groups.members if len(g) > 1]
    assert all(groups.start(groups.members.index(g), groups.kv_slots[0]).shared == SHARED for g in of_several)
    for tier, parts in result.allocated.items():
        planned = result.plan.bytes[tier]
        assert {k: n for k, n in parts.items() if n} == {k: planned[k] for k, n in parts.items() if n}


@pytest.mark.parametrize("seed", range(6))
def test_a_compressed_cache_holds_the_same(
    reference: Reference, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    hardware = rng.choice([HOST, EMULATED])
    policy = random_policy(rng, hardware, Lossy(kv_cache=Compression(4, 8), value_share=rng.choice([1.0, 0.4])))
    together, _ = run(reference, policy, hardware, tmp_path)
    monkeypatch.setattr(generation, "LEAST_SHARED", SHARED + 1)
    assert together == run(reference, policy, hardware, tmp_path)[0], policy


@pytest.mark.parametrize("chunk", [None, 6])
def test_rows_are_saved(
    reference: Reference, chunk: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link carries the embedded rows of every token that is computed, and no other byte."""
    policy = Policy(7, 1, on(Tier.CPU), on(Tier.GPU), on(Tier.GPU), prefill_chunk=chunk)
    _, saving = run(reference, policy, EMULATED, tmp_path)
    monkeypatch.setattr(generation, "LEAST_SHARED", SHARED + 1)
    _, plain = run(reference, policy, EMULATED, tmp_path)
    tables = sum(t.tensor.spec.shape[1] for t in reference.weights.packed.tables)
    saved = (len(reference.prompts) - 1) * SHARED * tables * 4
    assert plain.lanes[Lane.H2D].bytes - saving.lanes[Lane.H2D].bytes == saved


def test_equal_prompts_keep_a_token_each(tmp_path: Path) -> None:
    reference = reference_of("llama-tied-grouped", prompts_with(11, [3]) * 5, tmp_path)
    for policy in (Policy(5, 1), Policy(2, 2, prefill_chunk=4)):
        assert run(reference, policy, HOST, tmp_path)[0] == reference.tokens


def test_one_new_token_shares_nothing(reference: Reference, tmp_path: Path) -> None:
    """Without a cache there is nothing to read what is shared from."""
    tokens, _ = run(reference, Policy(7, 1), HOST, tmp_path, new_tokens=1)
    assert tokens == [ids[:1] for ids in reference.tokens]


def test_what_prompts_have_in_common() -> None:
    def shared(*prompts: list[int]) -> list[int]:
        running = to_full_length(prompts, SamplingParams(max_tokens=3))
        return [request.shared for request in requests_of(running)]

    start = list(range(10, 20))
    assert shared([*start, 1], [*start, 2], [*start, 1, 5]) == [10] * 3
    assert shared([*start, 1], start) == [10] * 2
    assert shared([*start, 1]) == [0]
    assert shared([*start, 1], [*start[:7], 2]) == [0] * 2
    assert shared([*start, 1], [*start, 2], [7]) == [0] * 3
    assert requests_of(to_full_length([[5]], SamplingParams(max_tokens=3))) == [Request(1, 3)]
