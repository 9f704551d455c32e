"""What a cell tells of itself while it runs: seldom, whole, and of every kind of system."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flexgen_bench.core.model import DType
from flexgen_bench.core.moment import JobState, Moment
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import to_full_length
from flexgen_bench.runner.events import Emitter, SilentDisplay, show
from flexgen_bench.runner.moments import INTERVAL_S, Moments
from tests.support.tiny_models import HOST, random_model, save


class Seen(SilentDisplay):
    def __init__(self) -> None:
        self.moments: list[Moment] = []

    def moment(self, moment: Moment) -> None:
        self.moments.append(moment)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def told(lines: bytes) -> list[Moment]:
    seen = Seen()
    for line in lines.decode().splitlines():
        show(line, seen)
    return seen.moments


def test_a_thousand_reports_a_second_are_one_moment_a_second() -> None:
    read, write = os.pipe()
    clock = Clock()
    asked: list[int] = []

    def state() -> JobState:
        asked.append(1)
        return JobState(len(asked), 3, 0, 2, 1, {"cpu": 10}, {"cpu": 20}, {"disk_read": 7}, {"cpu": 0.5})

    moments = Moments(Emitter(write), state, clock)
    for stage in ("warmup", "measure"):
        moments.begin(stage)
        for done in range(1, 2501):
            clock.now += 0.001
            moments.tokens("decode", done, 2500)
        moments.end()
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        seen = told(pipe.read())
    assert INTERVAL_S == 1.0
    assert [(m.stage, m.generation) for m in seen] == [("warmup", 1)] * 3 + [("measure", 2)] * 3
    assert [m.decode_tokens for m in seen[:3]] == pytest.approx([1000, 2000, 2500], abs=1)
    assert [m.elapsed_s for m in seen[3:]] == pytest.approx([1.0, 2.0, 2.5], abs=0.002)
    assert [m.time_s for m in seen[3:]] == pytest.approx([3.5, 4.5, 5.0], abs=0.002)
    assert len(asked) == 6, "the system is asked when a moment is told, and not at every token"
    assert seen[0].job == JobState(1, 3, 0, 2, 1, {"cpu": 10}, {"cpu": 20}, {"disk_read": 7}, {"cpu": 0.5})
    assert seen[0].resident_bytes is not None
    assert seen[0].resident_bytes > 2**20


def test_what_only_looks_like_a_moment_is_shown_nowhere() -> None:
    lines = [{"event": "moment"}, {"event": "moment", "stage": 1, "generation": "x"}, {"moment": 1}]
    assert told("\n".join(json.dumps(line) for line in lines).encode()) == []


def test_the_queue_of_our_engine_adds_up_at_every_pass(tmp_path: Path) -> None:
    """Five prompts in blocks of two: whoever is not waiting, computing or decoding has all its tokens."""
    folder = save(random_model("opt"), tmp_path / "checkpoint")
    weights = PackedWeights.from_checkpoint(folder, DType.FLOAT32, tmp_path / "cache")
    on_cpu = Placement.all_on(Tier.CPU)
    engine = weights.engine(Policy(2, 1, on_cpu, on_cpu, on_cpu), Device.open(HOST, 1), tmp_path)
    states: list[JobState] = []

    def look(what: str, done: int, total: int) -> None:
        state = engine.job_state()
        assert state is not None
        states.append(state)

    try:
        assert engine.job_state() is None
        sequences = to_full_length([[1, 2, 3]] * 5, SamplingParams(max_tokens=4, ignore_eos=True))
        result = engine.generate(sequences, look)
        ended = engine.job_state()
    finally:
        engine.close()
    assert all(s.waiting + s.prefill + s.decode + s.done == 5 for s in states)
    assert (states[0].waiting, states[0].prefill, states[0].done) == (3, 2, 0)
    assert ended is not None
    assert (ended.waiting, ended.prefill, ended.decode, ended.done) == (0, 0, 0, 5)
    assert ended.passes == 12
    assert [s.passes for s in states] == sorted(s.passes for s in states)
    assert ended.used_bytes == {site.name: sum(parts.values()) for site, parts in result.allocated.items()}
    assert ended.planned_bytes["cpu"] >= ended.used_bytes["cpu"] > 0
    assert ended.busy_s["cpu"] > 0
