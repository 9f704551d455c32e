"""Tokens of micro-batches whose caches are attended to in several places are those of transformers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.tiers import Lane
from flexgen_bench.schedule.scheduler import Scheduler
from tests.engine.test_engine_tokens import Reference, check_allocated_as_planned, reference_of, run, until
from tests.support.tiny_models import EMULATED, random_prompts

LENGTHS = [1, 30, 2, 9, 9, 17, 5]
GPU, HOST = Placement(gpu=1), Placement(cpu=1)
THIRDS = Placement(gpu=0.4, cpu=0.6)
FOUR_PLACES = Placement(0.25, 0.5, 0.25)


@pytest.fixture(scope="module", params=["opt", "llama-multi-query"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference_of(request.param, random_prompts(LENGTHS), tmp_path_factory.mktemp(request.param))


def divided(moved: float, kv: Placement, **changes: object) -> Policy:
    base = Policy(4, 2, HOST, kv, HOST, attention=AttentionSite.CPU, kv_moved=moved)
    return replace(base, **changes)  # type: ignore[arg-type]


POLICIES = {
    "moved and delegated": divided(0.5, HOST),
    "resident, moved and delegated": divided(0.5, THIRDS),
    "few moved": divided(0.2, THIRDS, weights=GPU, activations=GPU),
    "from disk, too": divided(0.6, FOUR_PLACES),
    "one staging buffer": divided(0.5, THIRDS, prefetch=1),
    "continuous": divided(0.5, HOST, schedule=Schedule.CONTINUOUS),
    "some layers in place": divided(0.5, THIRDS, weights=Placement(gpu=0.5, cpu=0.5), offloaded=Offloaded.IN_PLACE),
    "chunks, one after the other": divided(0.5, THIRDS, prefill_chunk=5, overlap=False),
}


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_are_those_of_transformers(reference: Reference, name: str, tmp_path: Path) -> None:
    found, result = run(reference, POLICIES[name], EMULATED, tmp_path)
    assert found == reference.tokens
    check_allocated_as_planned(result, EMULATED)


def test_a_compressed_cache_says_the_same_wherever_it_is_attended_to(reference: Reference, tmp_path: Path) -> None:
    lossy = Lossy(kv_cache=Compression(8, 8))
    policies = (divided(0.5, THIRDS, lossy=lossy), divided(0.0, THIRDS, lossy=lossy))
    one, other = (run(reference, policy, EMULATED, tmp_path)[0] for policy in policies)
    assert one == other


@pytest.mark.one_in(2)
@pytest.mark.parametrize("seed", range(8))
def test_random_mixtures_with_sequences_that_end_early(reference: Reference, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"divided {reference.weights.shape.family} {seed}")
    policy = divided(
        rng.choice([0.2, 0.4, 0.7]),
        rng.choice([HOST, THIRDS, FOUR_PLACES]),
        gpu_batch_size=rng.choice([2, 3, 7]),
        num_gpu_batches=rng.choice([1, 2, 3]),
        weights=rng.choice([GPU, HOST, FOUR_PLACES]),
        activations=rng.choice([GPU, HOST, FOUR_PLACES]),
        prefetch=rng.choice([1, 2, 3]),
        schedule=rng.choice(list(Schedule)),
        prefill_chunk=rng.choice([None, 3, 20]),
        offloaded=rng.choice(list(Offloaded)),
    )
    stop = {i: ids[rng.randrange(9)] for i, ids in enumerate(reference.tokens) if rng.random() < 0.4}
    found, result = run(reference, policy, EMULATED, tmp_path, stop=stop)
    assert found == [until(ids, stop.get(i)) for i, ids in enumerate(reference.tokens)], policy
    check_allocated_as_planned(result, EMULATED)


def test_links_carry_what_is_simulated(reference: Reference, tmp_path: Path) -> None:
    """The engine moves the bytes of the schedule's steps, which are what the simulator plays."""
    policy = divided(0.5, HOST, weights=GPU, activations=GPU, gpu_batch_size=2, num_gpu_batches=3)
    _, result = run(reference, policy, EMULATED, tmp_path)
    assert result.plan is not None
    scheduler = Scheduler(policy, result.plan)
    moved = dict.fromkeys(result.lanes, 0)
    while not scheduler.is_done:
        for step in scheduler.steps(scheduler.schedule()):
            moved[step.lane] = moved.get(step.lane, 0) + step.bytes
        scheduler.postprocess()
    for lane in (Lane.H2D, Lane.D2H):
        assert result.lanes[lane].bytes == moved[lane]
