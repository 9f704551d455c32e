"""Sequences that go on from the keys and values of an earlier one: the tokens are those of a run of its own, and what
was there is not computed again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from flexgen_bench.core.policy import Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import Running, to_full_length
from flexgen_bench.engine.open_job import OpenJob
from flexgen_bench.engine.sampling import Sampler
from flexgen_bench.schedule.sequence_groups import Capacity
from tests.engine.test_engine_tokens import Reference, check_allocated_as_planned, on, random_policy, reference_of
from tests.support.tiny_models import EMULATED, HOST, random_prompts

NEW = 5
CAPACITY = Capacity(2, 60, NEW, kept_tokens=4 * (60 + NEW))
PLAIN = Policy(2, 1, on(Tier.CPU), on(Tier.CPU), on(Tier.CPU))


@pytest.fixture(scope="module", params=["llama-scaled-rope", "opt-no-bias", "gemma3"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference_of(request.param, random_prompts([12]), tmp_path_factory.mktemp(request.param))


def sequence(prompt: list[int], before: Running | None, max_tokens: int = NEW) -> Running:
    params = SamplingParams(max_tokens=max_tokens)
    made = Running(prompt, params, Sampler(params, prompt, 0), frozenset(), lambda new: False, keep=True)
    made.prefix = before.kept if before else None
    return made


def run(job: OpenJob, *sequences: Running) -> None:
    for each in sequences:
        job.add(each)
    while not job.is_idle:
        job.step()


@pytest.mark.one_in(5)
@pytest.mark.parametrize("seed", range(16))
def test_turns_are_those_of_runs_of_their_own(reference: Reference, seed: int, tmp_path: Path) -> None:
    """Any policy, also those whose caches lie where nothing is kept; prompts that go on, go back or go elsewhere."""
    draw = random.Random(seed)
    hardware = draw.choice([HOST, EMULATED])
    engine = reference.weights.engine(random_policy(draw, hardware), Device.open(hardware, 1), tmp_path)
    turns: list[list[Running]] = []
    with engine.open(CAPACITY) as job:
        before: list[Running | None] = [None, None]
        for _ in range(4):
            now = []
            for one in before:
                tokens = [] if one is None else [*one.prompt, *one.new]
                kept = tokens[: draw.choice([len(tokens), len(tokens), max(0, len(tokens) - 7), 3])]
                more = [draw.randrange(4, 100) for _ in range(draw.choice([0, 1, 2, 6]))]
                now.append(sequence((kept + more) or [5], one, draw.choice([1, 3, NEW])))
            run(job, *now)
            turns.append(now)
            before = list(now)
    check_allocated_as_planned(job.result, hardware)
    assert job.result.plan is not None
    planned = job.result.plan.bytes[job.result.plan.job.site].get("kept prefixes", 0)
    for now in turns:
        for one in now:
            alone = to_full_length([one.prompt], one.params)
            engine.generate(alone)
            assert one.new == alone[0].new
            assert (one.kept is not None) == job.capacity.keeps
            if one.kept is not None:
                size = sum(tensor.nbytes for layer in one.kept.layers for tensor in layer)
                assert size * job.capacity.kept_tokens <= planned * len(one.kept.tokens)
    engine.close()


def test_what_is_kept_is_not_computed_again(reference: Reference, tmp_path: Path) -> None:
    engine = reference.weights.engine(PLAIN, Device.open(HOST, 1), tmp_path)
    prompt = random_prompts([40])[0]
    with engine.open(CAPACITY) as job:
        first = sequence(prompt, None)
        run(job, first)
        assert first.kept is not None
        assert first.kept.tokens == (*prompt, *first.new[:-1])
        second = sequence([*prompt, *first.new, 7, 8], first)
        number = job.add(second)
        rows = job._request(second).prompt_len - job._request(second).kept
        assert rows == 3  # the last token of the answer, which was never fed, and the two new ones
        while not job.is_idle:
            job.step()
        assert number == 1
    engine.close()


def test_a_cancelled_answer_is_kept_as_far_as_it_has_come(reference: Reference, tmp_path: Path) -> None:
    engine = reference.weights.engine(PLAIN, Device.open(HOST, 1), tmp_path)
    prompt = random_prompts([9])[0]
    with engine.open(CAPACITY) as job:
        first = sequence(prompt, None)
        number = job.add(first)
        job.step()
        job.step()
        job.cancel(number)
        job.step()
        assert first.kept is not None
        assert first.kept.tokens == (*prompt, first.new[0])
        second = sequence([*prompt, *first.new, 9], first)
        run(job, second)
    alone = to_full_length([second.prompt], second.params)
    engine.generate(alone)
    assert second.new == alone[0].new
    engine.close()
