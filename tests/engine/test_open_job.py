"""Jobs that take requests while they run: the tokens of each are those of a run of its own, and places come back at
once."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgen_bench.core.errors import DoesNotFit, UserError
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.engine import Engine
from flexgen_bench.engine.generation import Running, to_full_length
from flexgen_bench.engine.open_job import CANCELLED, OpenJob
from flexgen_bench.engine.sampling import Sampler
from flexgen_bench.schedule.sequence_groups import Capacity
from tests.engine.test_engine_tokens import (
    NEW_TOKENS,
    Reference,
    check_allocated_as_planned,
    on,
    random_policy,
    reference_of,
    until,
)
from tests.support.tiny_models import EMULATED, HOST, random_prompts

LENGTHS = [1, 30, 2, 9, 9, 17, 5, 12]
CAPACITY = Capacity(sequences=3, prompt_len=30, gen_len=NEW_TOKENS)
PLAIN = Policy(2, 2, on(Tier.CPU), on(Tier.CPU), on(Tier.CPU))


@pytest.fixture(scope="module", params=["llama-tied-grouped", "opt-no-bias"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp(request.param)
    return reference_of(request.param, random_prompts(LENGTHS), folder)


@pytest.fixture
def engine(reference: Reference, tmp_path: Path) -> Iterator[Engine]:
    made = engine_of(reference, PLAIN, HOST, tmp_path)
    yield made
    made.close()


def engine_of(reference: Reference, policy: Policy, hardware: HardwareProfile, folder: Path) -> Engine:
    return reference.weights.engine(policy, Device.open(hardware, 1), folder)


def sequence(prompt: list[int], stop: int | None = None, max_tokens: int = NEW_TOKENS) -> Running:
    params = SamplingParams(max_tokens=max_tokens)
    ends = frozenset() if stop is None else frozenset([stop])
    return Running(prompt, params, Sampler(params, prompt, 0), ends, lambda new: False)


def finish(job: OpenJob) -> dict[int, list[int]]:
    """Step until nothing is left; the tokens of every sequence, as steps have told them."""
    found = defaultdict(list)
    while not job.is_idle:
        for new in job.step():
            found[new.number].append(new.token)
    return dict(found)


@pytest.mark.parametrize("seed", range(12))
def test_tokens_are_those_of_a_run_of_its_own(reference: Reference, seed: int, tmp_path: Path) -> None:
    """Any policy. Requests come at random moments and more of them than run at once; some are cancelled, some end
    early."""
    draw = random.Random(f"{reference.weights.shape.family}{seed}")
    hardware = draw.choice([HOST, EMULATED])
    engine = engine_of(reference, random_policy(draw, hardware), hardware, tmp_path)
    stops = {i: t[draw.randrange(NEW_TOKENS)] for i, t in enumerate(reference.tokens) if i % 3 == 0}
    waiting = [*range(len(reference.prompts))] * 2
    draw.shuffle(waiting)
    numbers: dict[int, int] = {}  # number in the job -> which prompt
    cancelled: set[int] = set()
    found: defaultdict[int, list[int]] = defaultdict(list)
    job = engine.open(CAPACITY)
    with job:
        while waiting or not job.is_idle:
            for _ in range(min(len(waiting), draw.choice([0, 0, 1, 2, 5]))):
                prompt = waiting.pop()
                number = job.add(sequence(reference.prompts[prompt], stops.get(prompt)))
                numbers[number] = prompt
            if numbers and draw.random() < 0.1:
                gone = draw.choice(list(numbers))
                cancelled.add(gone)
                job.cancel(gone)
            for new in job.step():
                assert new.number not in cancelled
                found[new.number].append(new.token)
    engine.close()
    check_allocated_as_planned(job.result, hardware)
    for number, prompt in numbers.items():
        expected = until(reference.tokens[prompt], stops.get(prompt))
        if number in cancelled:
            expected = expected[: len(found[number])]
        assert found[number] == expected, number


def test_a_request_starts_with_the_next_pass(engine: Engine, reference: Reference) -> None:
    with engine.open(CAPACITY) as job:
        first = job.add(sequence(reference.prompts[0]))
        assert [t.number for t in job.step()] == [first]
        second = job.add(sequence(reference.prompts[1]))
        assert {t.number for t in job.step()} == {first, second}


def test_a_place_is_free_with_the_pass_after_its_sequence_has_ended(engine: Engine, reference: Reference) -> None:
    """Three run at once; the fourth starts as soon as one of them has ended, not when all have."""
    with engine.open(CAPACITY) as job:
        for prompt, most in zip(reference.prompts[:3], (2, 5, 5), strict=True):
            job.add(sequence(prompt, max_tokens=most))
        fourth = job.add(sequence(reference.prompts[3]))
        assert fourth not in {t.number for _ in range(2) for t in job.step()}
        assert fourth in {t.number for t in job.step()}


def test_a_cancelled_sequence_gives_its_place_to_the_next(engine: Engine, reference: Reference) -> None:
    with engine.open(CAPACITY) as job:
        running = [sequence(p) for p in reference.prompts[:3]]
        numbers = [job.add(s) for s in running]
        late = job.add(sequence(reference.prompts[3]))
        job.step()
        job.cancel(numbers[1])
        job.cancel(numbers[1])  # twice is once
        assert {t.number for t in job.step()} == {numbers[0], numbers[2], late}
        assert running[1].finish_reason == CANCELLED
        waiting = job.add(sequence(reference.prompts[4]))
        job.cancel(waiting)
        job.cancel(999)  # nobody
        assert waiting not in finish(job)


def test_the_last_token_says_why_it_is_the_last(engine: Engine, reference: Reference) -> None:
    stop = reference.tokens[5][3]
    with engine.open(CAPACITY) as job:
        ended = job.add(sequence(reference.prompts[5], stop))
        full = job.add(sequence(reference.prompts[6]))
        reasons = defaultdict(list)
        while not job.is_idle:
            for new in job.step():
                reasons[new.number].append(new.finish_reason)
    assert reasons[ended][-1] == "stop"
    assert reasons[full] == [""] * (NEW_TOKENS - 1) + ["length"]


def test_nothing_to_do_is_no_pass(engine: Engine, reference: Reference) -> None:
    with engine.open(CAPACITY) as job:
        assert job.is_idle
        assert job.step() == []
        number = job.add(sequence(reference.prompts[0]))
        assert not job.is_idle
        assert finish(job) == {number: reference.tokens[0]}
        # Weights of the pass that did not follow were loaded; the next request finds them.
        number = job.add(sequence(reference.prompts[1]))
        assert finish(job) == {number: reference.tokens[1]}


def test_what_is_beyond_the_capacity_is_refused_and_disturbs_nobody(engine: Engine, reference: Reference) -> None:
    with engine.open(CAPACITY) as job:
        number = job.add(sequence(reference.prompts[0]))
        with pytest.raises(UserError, match="at most 30 and 9"):
            job.add(sequence([3] * 31))
        with pytest.raises(UserError, match="at most 30 and 9"):
            job.add(sequence([3], max_tokens=NEW_TOKENS + 1))
        assert finish(job) == {number: reference.tokens[0]}


def test_an_engine_does_one_job_at_a_time(engine: Engine, reference: Reference) -> None:
    """Two jobs would load their layers into the same buffers."""
    params = SamplingParams(max_tokens=2)
    with engine.open(CAPACITY) as job:
        with pytest.raises(UserError, match="in use by an open job"):
            engine.generate(to_full_length(reference.prompts, params))
        with pytest.raises(UserError, match="in use by an open job"):
            engine.open(CAPACITY)
    with pytest.raises(UserError, match="closed"):
        job.add(sequence([3]))
    with pytest.raises(UserError, match="closed"):
        job.step()
    job.close()
    engine.generate(to_full_length(reference.prompts, params))


def test_a_failure_closes_the_job_and_not_the_engine(
    engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = sequence(reference.prompts[0])
    monkeypatch.setattr(broken, "stop_text", lambda new: 1 // 0)
    with engine.open(CAPACITY) as job:
        job.add(broken)
        with pytest.raises(ZeroDivisionError):
            job.step()
        with pytest.raises(UserError, match="closed"):
            job.step()
    with engine.open(CAPACITY) as job:
        number = job.add(sequence(reference.prompts[1]))
        assert finish(job) == {number: reference.tokens[1]}


def test_a_capacity_without_room_is_refused(engine: Engine, reference: Reference) -> None:
    with pytest.raises(DoesNotFit):
        engine.open(Capacity(3, 10**9, 10**9))
    with engine.open(CAPACITY) as job:
        number = job.add(sequence(reference.prompts[0]))
        assert finish(job) == {number: reference.tokens[0]}


def test_greedy_and_sampled_requests_share_passes(engine: Engine, reference: Reference) -> None:
    """A sampled sequence needs its logits on the host, a greedy one the number of the largest: both in one micro-batch,
    each as alone."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.8, top_p=0.9, seed=5)

    def sampled() -> Running:
        prompt = reference.prompts[1]
        return Running(prompt, params, Sampler(params, prompt, 0), frozenset(), lambda new: False)

    alone = sampled()
    engine.generate([alone])
    with engine.open(CAPACITY) as job:
        numbers = [job.add(sampled()), job.add(sequence(reference.prompts[2]))]
        found = finish(job)
    assert [found[n] for n in numbers] == [alone.new, reference.tokens[2]]
