"""The operators that the planner counts for a step are those that the engine issues."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import host_counts

from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.policy import AttentionSite, Placement, Policy, Schedule
from flexgen_bench.engine.actions import Actions
from flexgen_bench.planner.issued_operators import IssuedOperators
from flexgen_bench.schedule.steps import Step, StepKind

GPU, CPU, HALF = Placement(gpu=1), Placement(cpu=1), Placement(gpu=0.5, cpu=0.5)
Found = dict[tuple[str, StepKind], tuple[float, float]]

CASES = {
    "resident": host_counts.CASES["resident"].policy,
    "weights moved": host_counts.CASES["weights moved"].policy,
    "half of the KV moved": host_counts.CASES["half of the KV moved"].policy,
    "KV attended by the cpu, activations moved": Policy(4, 2, GPU, HALF, CPU, attention=AttentionSite.CPU),
    "4-bit KV": host_counts.CASES["4-bit KV"].policy,
    "4-bit weights, 4-bit KV moved": Policy(
        4, 2, GPU, HALF, GPU, lossy=Lossy(host_counts.FOUR, host_counts.FOUR)
    ),
    "continuous": Policy(4, 2, GPU, GPU, GPU, schedule=Schedule.CONTINUOUS),
}
# The first layer of a pass does what all share, so one more or less; and a tenth.
NEAR, SHARE = 1.5, 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host-operators")


@pytest.mark.parametrize("case", CASES)
def test_the_planner_counts_what_the_engine_issues(case: str, folder: Path) -> None:
    check(counted(CASES[case], host_counts.tiny_opt(), folder))


def test_rotary_positions_and_gates_are_counted(folder: Path) -> None:
    for case in ("resident", "half of the KV moved"):
        check(counted(CASES[case], host_counts.tiny_llama(), folder))


def check(found: Found) -> None:
    """Operators of each kind of step, on average: counted by the engine, and by the planner."""
    assert found
    off = {
        kind: (engine, planner)
        for kind, (engine, planner) in found.items()
        if abs(engine - planner) > max(NEAR, SHARE * engine)
    }
    assert not off, off


def counted(policy: Policy, shape: ModelShape, folder: Path) -> Found:
    """By phase and kind of step. (Unpacking is one operator for each tensor here, whatever its kernel; a unit has more
    or fewer of them. Embedding has one step in a pass.)"""
    meter = host_counts._Meter()
    planned: dict[tuple[str, StepKind], list[int]] = {}
    act, made = Actions.act, Actions.__init__
    plans: list[IssuedOperators] = []

    def init(self: Actions, *given: object, **named: object) -> None:
        made(self, *given, **named)  # type: ignore[arg-type]
        plans.append(IssuedOperators(given[3]))  # type: ignore[arg-type]

    def watched(self: Actions, step: Step) -> None:
        act(self, step)
        if step.lane.of_accelerator:
            phase = "" if step.on_weights else "prefill" if step.micro_batch.is_prefill else "decode"
            planned.setdefault((phase, step.kind), []).append(plans[-1].of(step))

    with mock.patch.object(Actions, "__init__", init), mock.patch.object(Actions, "act", watched):
        host_counts.run(host_counts.Case(policy), shape, folder, meter.operators)
    return dict(_averages(meter, planned))


def _averages(
    meter: host_counts._Meter, planned: dict[tuple[str, StepKind], list[int]]
) -> Iterator[tuple[tuple[str, StepKind], tuple[float, float]]]:
    for kind, numbers in planned.items():
        if kind[1] not in (StepKind.EMBED, StepKind.DEQUANTIZE):
            engine = meter._operators[kind]
            yield kind, (engine["operators"] / engine["steps"], sum(numbers) / len(numbers))
