"""Decode passes that are recorded and launched, by a stand-in for CUDA graphs on CPU tensors: the same tokens, few
launches, and the eager path where something cannot be recorded. Nothing here has run on a device."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.instructions import NATIVE_SWITCH
from flexgen_bench.core.policy import Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine import decode_graphs, graphs, layers, static_decode
from flexgen_bench.engine import engine as engine_module
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import Running
from flexgen_bench.engine.job_run import JobResult
from flexgen_bench.engine.sampling import Sampler
from flexgen_bench.planner.graph_memory import graph_bytes
from flexgen_bench.schedule.sequence_groups import Capacity
from tests.conftest import ROOT
from tests.engine.test_engine_tokens import Reference, on, reference_of, run, until
from tests.support.tiny_models import EMULATED, random_prompts

sys.path.insert(0, str(ROOT / "benchmarks"))
from fake_graphs import FakeCapture

GPU, CPU, HALF = on(Tier.GPU), on(Tier.CPU), Placement(gpu=0.5, cpu=0.5)
LENGTHS = [1, 30, 2, 9, 9, 17, 5]


@pytest.fixture(scope="module", params=["llama-tied-grouped", "opt-no-bias"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference_of(request.param, random_prompts(LENGTHS), tmp_path_factory.mktemp(request.param))


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[FakeCapture]:
    """As on a GPU; what was recorded in each job."""
    made: list[FakeCapture] = []

    def capture() -> FakeCapture:
        made.append(FakeCapture())
        return made[-1]

    monkeypatch.setenv(NATIVE_SWITCH, "0")  # kernels for processors write where torch does not see it
    monkeypatch.setattr(Device, "launches_kernels", True)
    monkeypatch.setattr(Device, "records_graphs", True)
    monkeypatch.setattr(graphs, "CudaCapture", capture)
    return made


@pytest.mark.parametrize("length", [64, 4], ids=["one length", "several lengths"])
@pytest.mark.parametrize(
    "policy",
    [
        Policy(3, 3, GPU, GPU, GPU),
        Policy(7, 1, GPU, GPU, GPU, prefill_chunk=8),
        Policy(1, 2, GPU, GPU, GPU),
        Policy(4, 2, GPU, GPU, GPU, schedule=Schedule.CONTINUOUS),
        Policy(3, 2, GPU, GPU, GPU, overlap=False),
    ],
    ids=["resident", "one micro-batch", "blocks", "continuous", "no overlap"],
)
def test_tokens_are_those_of_transformers(
    reference: Reference,
    policy: Policy,
    length: int,
    captured: list[FakeCapture],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(static_decode, "REACH", length)
    tokens, result = run(reference, policy, EMULATED, tmp_path)
    assert tokens == reference.tokens
    assert captured[0].launches > 0 or policy.schedule is Schedule.CONTINUOUS
    if captured[0].launches:
        assert result.decode_path == (
            f"decode passes: {len(captured[0].recorded)} CUDA graphs, launched {captured[0].launches} times"
        )


def test_a_new_shape_is_recorded_anew(reference: Reference, captured: list[FakeCapture], tmp_path: Path) -> None:
    """Sequences leave, one after the other; those that are left lie elsewhere in the micro-batch."""
    stop = {i: reference.tokens[i][2 * i] for i in (1, 3)}
    expected = [until(ids, stop.get(i)) for i, ids in enumerate(reference.tokens)]
    tokens, _ = run(reference, Policy(7, 1, GPU, GPU, GPU), EMULATED, tmp_path, stop=stop)
    assert tokens == expected
    shapes = len({len(expected[i]) for i in (1, 3)} - {9})
    assert shapes
    assert 4 <= len(captured[0].recorded) <= 4 * (1 + shapes)


def test_the_next_block_finds_its_graphs(captured: list[FakeCapture], tmp_path: Path) -> None:
    """Prompts of one length lie in the same places, whoever they are: two micro-batches are recorded, not six."""
    reference = reference_of("opt-no-bias", random_prompts([9] * 12), tmp_path)
    assert run(reference, Policy(2, 2, GPU, GPU, GPU), EMULATED, tmp_path)[0] == reference.tokens
    assert len(captured[0].recorded) == 2 * 4


def test_greedy_and_other_sequences(reference: Reference, captured: list[FakeCapture], tmp_path: Path) -> None:
    """Layers of a micro-batch from which the host samples are launched, too; its tokens are the host's."""

    def tokens(policy: Policy) -> list[list[int]]:
        engine = reference.weights.engine(policy, Device.open(EMULATED, 1), tmp_path)
        sequences = []
        for i, prompt in enumerate(reference.prompts):
            params = SamplingParams(max_tokens=9, temperature=0.7 * (i > 3), seed=3)
            sequences.append(Running(prompt, params, Sampler(params, prompt, i), frozenset(), lambda new: False))
        engine.generate(sequences)
        engine.close()
        return [s.new for s in sequences]

    assert tokens(Policy(2, 4, GPU, GPU, GPU)) == tokens(Policy(2, 4, CPU, CPU, CPU))
    assert captured[0].launches > 0
    assert not captured[1:] or not captured[1].launches


def test_open_jobs(reference: Reference, captured: list[FakeCapture], tmp_path: Path) -> None:
    engine = reference.weights.engine(Policy(4, 1, GPU, GPU, GPU), Device.open(EMULATED, 1), tmp_path)
    params = SamplingParams(max_tokens=9)
    found: dict[int, list[int]] = {}
    with engine.open(Capacity(4, 30, 9)) as job:
        for prompt in reference.prompts:
            job.add(Running(prompt, params, Sampler(params, prompt, 0), frozenset(), lambda new: False))
        while not job.is_idle:
            for new in job.step():
                found.setdefault(new.number, []).append(new.token)
    engine.close()
    assert [found[i] for i in range(len(LENGTHS))] == reference.tokens
    assert captured[0].launches > 0


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3, 5])
def test_what_cannot_be_recorded_is_issued_as_it_is(
    reference: Reference,
    fails_at: int,
    captured: list[FakeCapture],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """Whichever piece it is: one warning, the same tokens, and a record that says so."""
    monkeypatch.setattr(graphs, "CudaCapture", lambda: FakeCapture(fails_at))
    with caplog.at_level(logging.WARNING):
        tokens, result = run(reference, Policy(4, 2, GPU, GPU, GPU), EMULATED, tmp_path)
    assert tokens == reference.tokens
    said = [r.getMessage() for r in caplog.records if "CUDA graph" in r.getMessage()]
    assert len(said) == 1
    assert "not permitted when stream is capturing" in said[0]
    assert "not permitted" in result.decode_path


def test_off_on_request(
    reference: Reference, captured: list[FakeCapture], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(graphs.GRAPHS_SWITCH, "0")
    tokens, result = run(reference, Policy(4, 2, GPU, GPU, GPU), EMULATED, tmp_path)
    assert tokens == reference.tokens
    assert not captured
    assert result.decode_path == "decode passes: every operator is launched (FLEXGEN_GRAPHS=0)"


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (Policy(4, 2, CPU, GPU, GPU), "not computed where it lies"),
        (Policy(4, 2, HALF, GPU, GPU, offloaded=Offloaded.IN_PLACE), "not computed where it lies"),
        (Policy(4, 2, GPU, HALF, GPU), "came often enough"),
        (Policy(4, 2, GPU, GPU, GPU, lossy=Lossy(kv_cache=Compression(8, 16))), "compressed"),
    ],
    ids=["tables on the host", "layers on the host", "cache on the host", "compressed cache"],
)
def test_who_is_not_resident_decodes_as_ever(
    reference: Reference, policy: Policy, words: str, captured: list[FakeCapture], tmp_path: Path
) -> None:
    _, result = run(reference, policy, EMULATED, tmp_path)
    assert words in result.decode_path
    assert not captured or not captured[0].recorded


def test_a_formula_that_looks_at_values_is_not_recorded(
    reference: Reference, captured: list[FakeCapture], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It cannot be traced either (``kernels/formula.py``)."""
    monkeypatch.setattr(layers, "trace", lambda *_: None)
    tokens, result = run(reference, Policy(4, 2, GPU, GPU, GPU), EMULATED, tmp_path)
    assert tokens == reference.tokens
    assert "looks at values" in result.decode_path
    assert not captured[0].recorded


def test_no_graphs_without_room(
    reference: Reference, captured: list[FakeCapture], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engine_module, "graph_bytes", lambda plan: 2**60)
    tokens, result = run(reference, Policy(4, 2, GPU, GPU, GPU), EMULATED, tmp_path)
    assert tokens == reference.tokens
    assert "no room" in result.decode_path


def test_shapes_are_bounded(
    reference: Reference, captured: list[FakeCapture], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The oldest goes, when nothing of it is running."""
    monkeypatch.setattr(decode_graphs, "MAX_SHAPES", 3)
    monkeypatch.setattr(static_decode, "REACH", 2)
    tokens, result = run(reference, Policy(4, 2, GPU, GPU, GPU), EMULATED, tmp_path)
    assert tokens == reference.tokens
    assert captured[0].settled > 0
    assert isinstance(result, JobResult)
    assert result.plan is not None
    assert graph_bytes(result.plan) > 0
