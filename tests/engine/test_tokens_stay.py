"""Tables and head on the accelerator: tokens stay there, passes follow each other without a gap, and nobody gets
another token than before."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.policy import AttentionSite, Placement, Policy, Schedule
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Lane, LaneKind, Tier
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.engine import Engine
from flexgen_bench.engine.executor import Executor
from flexgen_bench.engine.generation import Running, to_full_length
from flexgen_bench.engine.job_run import JobRun
from flexgen_bench.engine.open_job import CANCELLED
from flexgen_bench.engine.sampling import Sampler
from flexgen_bench.schedule.sequence_groups import Capacity
from flexgen_bench.schedule.steps import Step, StepKind
from tests.engine.test_engine_tokens import NEW_TOKENS, Reference, check_allocated_as_planned, on, reference_of, until
from tests.support.tiny_models import EMULATED, HOST, random_prompts

GPU, CPU = on(Tier.GPU), on(Tier.CPU)
LENGTHS = [1, 30, 2, 9, 9, 17, 5, 12]
POLICIES = {
    "resident": Policy(3, 2, GPU, GPU, GPU),
    "continuous": Policy(3, 2, GPU, GPU, GPU, schedule=Schedule.CONTINUOUS),
    "prompts in chunks": Policy(4, 1, GPU, GPU, GPU, prefill_chunk=8),
    "cache moved": Policy(2, 2, GPU, CPU, GPU),
    "attended by the cpu": Policy(2, 2, GPU, Placement(gpu=0.5, cpu=0.5), CPU, attention=AttentionSite.CPU),
    "attended to in three places": Policy(
        4, 2, GPU, Placement(gpu=0.3, cpu=0.7), GPU, attention=AttentionSite.CPU, kv_moved=0.5
    ),
    "one step after the other": Policy(3, 2, GPU, GPU, GPU, overlap=False),
}
CAPACITY = Capacity(sequences=3, prompt_len=30, gen_len=NEW_TOKENS)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Learned positions: one beyond the last is an error."""
    folder = tmp_path_factory.mktemp("stay")
    return reference_of("opt-no-bias", random_prompts(LENGTHS), folder)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Every step that is submitted."""
    seen: list[Step] = []
    submit = Executor.submit

    def watched(self: Executor, step: Step, action: object) -> tuple[Lane, int]:
        seen.append(step)
        return submit(self, step, action)  # type: ignore[arg-type]

    monkeypatch.setattr(Executor, "submit", watched)
    return seen


def engine_of(reference: Reference, policy: Policy, folder: Path, hardware: object = EMULATED) -> Engine:
    return reference.weights.engine(policy, Device.open(hardware, 1), folder)  # type: ignore[arg-type]


def running(prompt: list[int], params: SamplingParams, stream: int = 0, stop: Iterable[int] = ()) -> Running:
    return Running(prompt, params, Sampler(params, prompt, stream), frozenset(stop), lambda new: False)


def mixed(reference: Reference) -> list[Running]:
    """Greedy ones, some of which end early by a token or by ``max_tokens``, and such as the host has to sample."""
    draw, found = random.Random(5), []
    for i, prompt in enumerate(reference.prompts):
        kinds = [{}, {"temperature": 0.8, "seed": i}, {"repetition_penalty": 1.3}, {"logprobs": 2}]
        params = SamplingParams(max_tokens=draw.randint(1, NEW_TOKENS), **kinds[i % 4])
        stop = [reference.tokens[i][4]] if i % 8 == 4 else []
        found.append(running(prompt, params, i, stop))
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_are_those_of_the_host(reference: Reference, name: str, tmp_path: Path) -> None:
    """Of greedy, drawn and penalised sequences in the same micro-batches, and what their logits were."""
    results = []
    for policy, hardware in ((Policy(3, 2, CPU, CPU, CPU), HOST), (POLICIES[name], EMULATED)):
        engine, sequences = engine_of(reference, policy, tmp_path, hardware), mixed(reference)
        result = engine.generate(sequences)
        engine.close()
        check_allocated_as_planned(result, hardware)
        results.append(sequences)
    for host, device in zip(*results, strict=True):
        assert (device.new, device.finish_reason) == (host.new, host.finish_reason)
        for mine, other in zip(device.logprobs, host.logprobs, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("stopped", [False, True])
def test_no_pass_waits_for_the_tokens_of_the_one_before(
    reference: Reference, stopped: bool, steps: list[Step], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The next pass is submitted before the host has seen them, and beyond an end no more than one is."""
    finish, gaps = JobRun._finish, []

    def watched(self: JobRun, one: object) -> None:
        gaps.append(not self._submitted and not self._scheduler.is_done)
        finish(self, one)  # type: ignore[arg-type]

    monkeypatch.setattr(JobRun, "_finish", watched)
    engine = engine_of(reference, Policy(8, 1, GPU, GPU, GPU), tmp_path)
    params = SamplingParams(max_tokens=NEW_TOKENS)
    ends = [reference.tokens[i][3:4] if stopped else [] for i in range(len(LENGTHS))]
    sequences = [running(p, params, stop=s) for p, s in zip(reference.prompts, ends, strict=True)]
    engine.generate(sequences)
    engine.close()
    assert [s.new for s in sequences] == [
        until(tokens, stop[0] if stop else None) for tokens, stop in zip(reference.tokens, ends, strict=True)
    ]
    assert not any(gaps)
    longest = max(len(s.new) for s in sequences)
    assert len(gaps) == longest + stopped
    lanes = {step.lane.kind for step in steps if step.token}
    assert lanes == {LaneKind.GPU, LaneKind.D2H}, "the host computes nothing, and sends nothing up"


def test_what_the_accelerator_does_next_waits_for_no_host_lane(
    reference: Reference, steps: list[Step], tmp_path: Path
) -> None:
    engine = engine_of(reference, POLICIES["resident"], tmp_path)
    engine.generate(to_full_length(reference.prompts, SamplingParams(max_tokens=NEW_TOKENS)))
    engine.close()
    per_pass = [s.kind for s in steps if s.token == 2 and s.micro_batch_index == 0]
    layers = reference.weights.shape.num_layers
    expected = [StepKind.EMBED, *[StepKind.LAYER] * layers, StepKind.HEAD, StepKind.SAMPLE, StepKind.MOVE_TOKENS]
    assert per_pass == expected * (len(per_pass) // len(expected))
    assert not any(s.lane is Lane.CPU for s in steps)


def test_tables_on_the_host_change_nothing(reference: Reference, steps: list[Step], tmp_path: Path) -> None:
    """Then a pass is fed by the host, which must have seen the tokens before."""
    engine = engine_of(reference, Policy(3, 2, CPU, GPU, GPU), tmp_path)
    engine.generate(to_full_length(reference.prompts, SamplingParams(max_tokens=NEW_TOKENS)))
    engine.close()
    kinds = {step.kind for step in steps}
    assert StepKind.MOVE_LOGITS in kinds
    assert StepKind.MOVE_TOKENS not in kinds


@pytest.mark.parametrize("seed", range(6))
def test_open_jobs(reference: Reference, seed: int, tmp_path: Path) -> None:
    """Requests of all kinds come, end early and are cancelled while the next pass is under way. What a step tells is
    what a run of its own says, in order, and nothing after an end."""
    draw = random.Random(seed)
    policy = POLICIES[draw.choice(["resident", "continuous", "attended by the cpu"])]
    engine, expected = engine_of(reference, policy, tmp_path), {}
    alone = mixed(reference)
    engine.generate(alone)
    found, ended, cancelled = defaultdict(list), {}, set()
    with engine.open(CAPACITY) as job:
        waiting = list(range(len(LENGTHS))) * 2
        draw.shuffle(waiting)
        sequences = {}
        while waiting or not job.is_idle:
            for _ in range(min(len(waiting), draw.choice([0, 1, 3]))):
                place = waiting.pop()
                sequence = mixed(reference)[place]
                number = job.add(sequence)
                expected[number], sequences[number] = alone[place].new, sequence
            live = [n for n in sequences if n not in ended and n not in cancelled]
            if live and draw.random() < 0.15:
                gone = draw.choice(live)
                cancelled.add(gone)
                job.cancel(gone)
            for new in job.step():
                assert new.number not in cancelled
                assert new.number not in ended
                found[new.number].append(new.token)
                if new.finish_reason:
                    ended[new.number] = new.finish_reason
        assert not job._run.in_use() or not job._live
    engine.close()
    for number, tokens in expected.items():
        if number in cancelled:
            assert sequences[number].finish_reason == CANCELLED
            assert found[number] == tokens[: len(found[number])] == sequences[number].new
            continue
        assert found[number] == tokens == sequences[number].new


def test_a_step_gives_the_tokens_of_its_own_pass(reference: Reference, tmp_path: Path) -> None:
    """Streams must not lag: the first step has the first token although the second pass has begun."""
    engine = engine_of(reference, POLICIES["resident"], tmp_path)
    with engine.open(CAPACITY) as job:
        job.add(running(reference.prompts[1], SamplingParams(max_tokens=NEW_TOKENS)))
        given = [[new.token for new in job.step()] for _ in range(NEW_TOKENS)]
        assert job.is_idle
        assert job.step() == []
    engine.close()
    assert given == [[token] for token in reference.tokens[1]]


def test_nothing_of_sequences_that_have_ended_is_kept(reference: Reference, tmp_path: Path) -> None:
    engine = engine_of(reference, POLICIES["resident"], tmp_path)
    with engine.open(CAPACITY) as job:
        for _ in range(2):
            for prompt, tokens in zip(reference.prompts[:3], reference.tokens, strict=False):
                job.add(running(prompt, SamplingParams(max_tokens=NEW_TOKENS), stop=[tokens[2]]))
            while not job.is_idle:
                job.step()
        job.add(running(reference.prompts[0], SamplingParams(max_tokens=1)))
        while not job.is_idle:
            job.step()
        assert not job._sequences
        assert not job._run._gone
    engine.close()


def test_an_error_while_the_next_pass_runs_closes_the_job(reference: Reference, tmp_path: Path) -> None:
    engine = engine_of(reference, POLICIES["resident"], tmp_path)

    def fails(new: list[int]) -> bool:
        raise ValueError("stop")

    params = SamplingParams(max_tokens=NEW_TOKENS)
    with pytest.raises(ValueError, match="stop"):
        engine.generate([Running(reference.prompts[0], params, Sampler(params, [], 0), frozenset(), fails)])
    job = engine.open(CAPACITY)
    job.add(Running(reference.prompts[0], params, Sampler(params, [], 0), frozenset(), fails))
    with pytest.raises(ValueError, match="stop"):
        job.step()
    with pytest.raises(UserError, match="closed"):
        job.step()
    again = to_full_length(reference.prompts, params)
    engine.generate(again)
    assert [s.new for s in again] == reference.tokens
    engine.close()
