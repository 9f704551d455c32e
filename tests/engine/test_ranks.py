"""Several ranks say what one says: every tier, schedule and site of attention, whatever layers each of them has."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.pipeline import Stage, even_stages, stages_of
from flexgen_bench.core.policy import AttentionSite, ExpertLoads, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.engine import Engine
from flexgen_bench.engine.generation import Running
from flexgen_bench.engine.job_run import JobRun
from flexgen_bench.engine.sampling import Sampler
from tests.engine.test_engine_tokens import (
    GPU_MIXES,
    HOST_MIXES,
    LENGTHS,
    NEW_TOKENS,
    Reference,
    check_allocated_as_planned,
    on,
    random_policy,
    reference_of,
    until,
)
from tests.support.rank_engines import Rank, all_well, on_ranks
from tests.support.tiny_models import EMULATED, HOST, random_model, random_prompts, save

GREEDY = SamplingParams(max_tokens=NEW_TOKENS)
GPU, CPU, DISK, THIRDS = on(Tier.GPU), on(Tier.CPU), on(Tier.DISK), Placement(0.4, 0.3, 0.3)
ONE = [Stage(0, 1, 0, 4)]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference_of("qwen2", random_prompts(LENGTHS), tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The last rank has the token table for itself."""
    return reference_of("gpt-neox-serial", random_prompts(LENGTHS), tmp_path_factory.mktemp("tied"))


def sequences_of(
    reference: Reference, params: SamplingParams = GREEDY, stop: dict[int, int] | None = None
) -> list[Running]:
    """New ones; ``stop`` gives some prompts an id that ends them."""
    ends = {i: frozenset([token]) for i, token in (stop or {}).items()}
    return [
        Running(prompt, params, Sampler(params, prompt, i), ends.get(i, frozenset()), lambda new: False)
        for i, prompt in enumerate(reference.prompts)
    ]


def run(
    reference: Reference,
    policies: Policy | Sequence[Policy],
    hardware: HardwareProfile,
    stages: Sequence[Stage],
    folder: Path,
    params: SamplingParams = GREEDY,
    stop: dict[int, int] | None = None,
) -> list[Rank]:
    """A job on all ranks. What was planned is what was allocated, on each of them."""
    own = [policies] * len(stages) if isinstance(policies, Policy) else policies
    ranks = on_ranks(*(reference.weights, own, hardware, stages, folder), lambda: sequences_of(reference, params, stop))
    all_well(ranks)
    for rank in ranks:
        check_allocated_as_planned(rank.result, hardware)
    return ranks


def check(ranks: Sequence[Rank], tokens: list[list[int]], told: object = "") -> None:
    for number, rank in enumerate(ranks):
        assert rank.tokens == tokens, (number, told)


CASES = {
    "everything on the accelerators": (EMULATED, [2, 2], Policy(2, 2, GPU, GPU, GPU)),
    "everything streamed from disk": (EMULATED, [1, 2, 1], Policy(2, 1, DISK, DISK, DISK, prefetch=3)),
    "thirds, four ranks": (EMULATED, [1, 1, 1, 1], Policy(1, 2, THIRDS, THIRDS, THIRDS)),
    "continuous, chunks": (
        EMULATED,
        [1, 3],
        Policy(2, 2, CPU, CPU, GPU, schedule=Schedule.CONTINUOUS, prefill_chunk=8),
    ),
    "the cpu attends": (EMULATED, [3, 1], Policy(1, 3, CPU, CPU, CPU, attention=AttentionSite.CPU)),
    "the cpu attends to a part": (
        EMULATED,
        [1, 2, 1],
        Policy(2, 2, THIRDS, CPU, GPU, attention=AttentionSite.CPU, kv_moved=0.5, prefill_chunk=9),
    ),
    "layers computed in place": (
        EMULATED,
        [2, 2],
        Policy(1, 3, Placement(gpu=0.5, cpu=0.5), GPU, GPU, offloaded=Offloaded.IN_PLACE),
    ),
    "one step after the other": (EMULATED, [2, 1, 1], Policy(2, 2, DISK, CPU, DISK, overlap=False)),
    "hosts": (HOST, [1, 1, 1, 1], Policy(2, 1, CPU, CPU, CPU)),
    "hosts, disk, continuous": (HOST, [1, 2, 1], Policy(1, 3, DISK, DISK, DISK, schedule=Schedule.CONTINUOUS)),
    "more waves than sequence groups": (HOST, [1, 1, 1, 1], Policy(7, 1, CPU, DISK, CPU)),
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_with_transformers(case: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The models take turns: with a head of its own, and with the embedding's table."""
    reference: Reference = request.getfixturevalue(["untied", "tied"][list(CASES).index(case) % 2])
    hardware, layers, policy = CASES[case]
    stages = stages_of(layers, reference.weights.shape.num_layers)
    check(run(reference, policy, hardware, stages, tmp_path), reference.tokens)


def any_job(reference: Reference, seed: int, folder: Path, apart: bool = False) -> None:
    """Any ranges of layers, and on every rank another policy but for the shape of its block; sequences end early."""
    rng = random.Random(f"ranks{reference.weights.shape.family}{seed}")
    hardware, num_layers = rng.choice([HOST, EMULATED]), reference.weights.shape.num_layers
    ends = [0, *sorted(rng.sample(range(1, num_layers), rng.randint(1, min(4, num_layers) - 1))), num_layers]
    stages = stages_of([stop - first for first, stop in pairwise(ends)], num_layers)
    shape, policies = random_policy(rng, hardware), []
    for _ in stages:
        own = random_policy(rng, hardware)
        if rng.random() < 0.3 and hardware is EMULATED:
            own = replace(own, kv_moved=rng.choice([0.3, 0.5]), attention=AttentionSite.CPU)
        if apart:
            mixes, loads = HOST_MIXES if hardware is HOST else GPU_MIXES, rng.choice(list(ExpertLoads))
            own = replace(own, experts=rng.choice(mixes), expert_loads=loads)
        batches = {name: getattr(shape, name) for name in ("gpu_batch_size", "num_gpu_batches", "schedule")}
        policies.append(replace(own, **batches, prefill_chunk=shape.prefill_chunk))
    stop = {i: ids[rng.randrange(9)] for i, ids in enumerate(reference.tokens) if rng.random() < 0.4}
    expected = [until(ids, stop.get(i)) for i, ids in enumerate(reference.tokens)]
    check(run(reference, policies, hardware, stages, folder, stop=stop), expected, (seed, stages, policies))


@pytest.mark.parametrize("seed", range(3))
def test_any_policies(seed: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    any_job(request.getfixturevalue(["untied", "tied"][seed % 2]), seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_no_ranks_wait_for_each_other(block: int, untied: Reference, tied: Reference, tmp_path: Path) -> None:
    """Nor do they disagree, over 500 policies and interleavings."""
    for seed in range(1000 + 25 * block, 1025 + 25 * block):
        any_job([untied, tied][seed % 2], seed, tmp_path)


@pytest.mark.parametrize("seed", range(2))
def test_experts_of_their_own(seed: int, tmp_path: Path) -> None:
    """Layers without a mixture, with one, and with experts that all tokens meet, on different ranks."""
    any_job(
        reference_of(["glm4-moe", "qwen2-moe"][seed], random_prompts(LENGTHS), tmp_path), seed, tmp_path, apart=True
    )


@pytest.mark.parametrize("hardware", [HOST, EMULATED], ids=["host", "emulated"])
def test_four_bits(hardware: HardwareProfile, tmp_path: Path) -> None:
    """Weights and cache: rows of the tied token table are unpacked on the first rank, the table on the last one."""
    four, prompts = Compression(4, 16), random_prompts(LENGTHS)
    folder = save(random_model("gpt-neox-serial"), tmp_path / "ckpt")
    weights = PackedWeights.from_checkpoint(folder, DType.FLOAT32, tmp_path / "cache", compression=four)
    policy = Policy(2, 2, Placement(cpu=0.5, disk=0.5), CPU, CPU, lossy=Lossy(weights=four, kv_cache=four))
    reference = Reference(weights, prompts, [])
    [alone] = run(reference, policy, hardware, ONE, tmp_path)
    check(run(reference, policy, hardware, stages_of([1, 2, 1], 4), tmp_path), alone.tokens)


def test_sampled_tokens_and_their_probabilities(untied: Reference, tmp_path: Path) -> None:
    """The last rank draws, from the stream of each sequence, and all are told what it has found."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.9, top_p=0.9, seed=5, logprobs=3)
    policy = Policy(2, 2, CPU, CPU, CPU, schedule=Schedule.CONTINUOUS)
    one, *several = (
        run(untied, policy, EMULATED, stages, tmp_path, params)
        for stages in (ONE, even_stages(4, 2), even_stages(4, 4))
    )
    [expected] = one
    assert expected.tokens != untied.tokens
    for rank in (rank for ranks in several for rank in ranks):
        assert rank.tokens == expected.tokens
        for sequence, other in zip(rank.sequences, expected.sequences, strict=True):
            for found, known in zip(sequence.logprobs, other.logprobs, strict=True):
                assert found.logprob == pytest.approx(known.logprob, abs=1e-4)
                assert [token for token, _ in found.top] == [token for token, _ in known.top]
    for ranks in several:
        first, *others = ([sequence.logprobs for sequence in rank.sequences] for rank in ranks)
        assert all(other == first for other in others)


def test_a_rank_reads_and_holds_its_own_layers_alone(untied: Reference, tmp_path: Path) -> None:
    stages, policy = stages_of([1, 2, 1], 4), Policy(2, 2, GPU, GPU, GPU)
    ranks = run(untied, policy, EMULATED, stages, tmp_path)
    units = untied.weights.packed.units
    for stage, rank in zip(stages, ranks, strict=True):
        held = sum(unit.home_bytes for unit in units if stage.holds(unit.index, 4))
        assert rank.result.allocated[rank.result.plan.job.site]["weights"] == held  # type: ignore[union-attr]
    rows = sum(LENGTHS) + len(LENGTHS) * (NEW_TOKENS - 1)
    row_bytes = untied.weights.shape.hidden_size * 4
    for before, after in pairwise(ranks):
        assert before.result.lanes[Lane.NET_OUT].bytes == after.result.lanes[Lane.NET_IN].bytes == rows * row_bytes
    tokens = 8 * len(LENGTHS) * NEW_TOKENS
    assert [rank.result.lanes[Lane.NET_TOKENS].bytes for rank in ranks] == [tokens, tokens, 0]
    assert ranks[-1].result.lanes[Lane.NET_OUT].bytes == 2 * tokens


def test_one_job_after_the_other(untied: Reference, tmp_path: Path) -> None:
    """A rank may begin the next job while another is at the end of this one."""
    first: list[list[list[int]]] = []

    def another(engine: Engine) -> None:
        own = sequences_of(untied)
        engine.generate(own)
        first.append([sequence.new for sequence in own])
        state = engine.job_state()
        assert state is not None
        assert (state.done, state.waiting, state.decode) == (len(LENGTHS), 0, 0)

    policies, stages = [Policy(2, 2, CPU, DISK, CPU)] * 3, even_stages(4, 3)
    ranks = on_ranks(untied.weights, policies, HOST, stages, tmp_path, lambda: sequences_of(untied), another)
    check(all_well(ranks), untied.tokens)
    assert first == [untied.tokens] * 3


def test_passes_of_several_waves_are_under_way_at_once(
    untied: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there are ranks: with one, a rank would wait while the others compute."""
    under_way: list[int] = []
    finish = JobRun._finish

    def noted(self: JobRun, one: Any) -> None:
        under_way.append(len(self._submitted) + 1)
        finish(self, one)

    monkeypatch.setattr(JobRun, "_finish", noted)
    check(run(untied, Policy(1, 1, CPU, CPU, CPU), HOST, even_stages(4, 3), tmp_path), untied.tokens)
    assert max(under_way) == 3


@pytest.mark.parametrize("hardware", [HOST, EMULATED], ids=["host", "emulated"])
def test_a_tied_head_with_matrices_of_its_own(hardware: HardwareProfile, tmp_path: Path) -> None:
    """OPT-350M's projections out of and into a narrower embedding. What the plan had for the first rank was once more
    than what was read there, by what is the head's alone."""
    reference = reference_of("opt-350m-like", random_prompts(LENGTHS), tmp_path)
    stages, everything = stages_of([1, 2], 3), Placement.all_on(hardware.compute_tier)
    check(run(reference, Policy(3, 2, everything, CPU, CPU), hardware, stages, tmp_path), reference.tokens)
