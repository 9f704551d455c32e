"""The operators that the planner counts for a step are those that the engine issues."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

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
Found = dict[tuple[str, StepKind], list[tuple[int, int]]]

CASES = {
    "weights moved": host_counts.CASES["weights moved"].policy,
    "half of the KV moved": host_counts.CASES["half of the KV moved"].policy,
    "KV attended by the cpu, activations moved": Policy(4, 2, GPU, HALF, CPU, attention=AttentionSite.CPU),
    "4-bit KV": host_counts.CASES["4-bit KV"].policy,
    "4-bit weights, 4-bit KV moved": Policy(4, 2, GPU, HALF, GPU, lossy=Lossy(host_counts.FOUR, host_counts.FOUR)),
    "continuous": Policy(4, 2, GPU, GPU, GPU, schedule=Schedule.CONTINUOUS),
}
# Of a layer, one more or less, and a tenth.
NEAR, SHARE = 1.5, 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host-operators")


@pytest.mark.parametrize("case", CASES)
def test_the_planner_counts_what_the_engine_issues(case: str, folder: Path) -> None:
    check(counted(CASES[case], host_counts.tiny_opt(), folder))


def test_rotary_positions_and_gates_are_counted(folder: Path) -> None:
    for case in ("resident", "half of the KV moved"):
        check(counted(host_counts.CASES[case].policy, host_counts.tiny_llama(), folder))


@pytest.mark.parametrize("case", host_counts.MIXTURES)
def test_mixtures_are_counted(case: str, folder: Path) -> None:
    """Choosing experts, sorting by them and calling each were numbers that somebody had read in the code: 17 operators
    for an OUTPUT of 11."""
    check(counted(host_counts.MIXTURES[case].policy, host_counts.tiny_mixture(), folder))


def check(found: Found) -> None:
    """Operators of each kind of step, on average: counted by the engine, and by the planner. (Unpacking is one operator
    for each tensor here, whatever its kernel; a unit has more or fewer of them. Embedding has one step in a pass.)"""
    averages = {
        kind: (sum(engine for engine, _ in both) / len(both), sum(planner for _, planner in both) / len(both))
        for kind, both in found.items()
        if kind[1] not in (StepKind.EMBED, StepKind.DEQUANTIZE)
    }
    assert averages
    off = {kind: both for kind, both in averages.items() if abs(both[0] - both[1]) > max(NEAR, SHARE * both[0])}
    assert not off, off


class Counting(TorchDispatchMode):
    """Operators of the step that this thread, a lane, is at."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def counted(policy: Policy, shape: ModelShape, folder: Path) -> Found:
    """By phase and kind, of every step on an accelerator's lanes: operators by the engine's count and the planner's.
    Without the first projection of a layer, with which a job binds the layer's weights, those of every expert, too."""
    found: Found = {}
    bound: set[int] = set()
    act, made = Actions.act, Actions.__init__
    plans: list[IssuedOperators] = []

    def init(self: Actions, *given: Any) -> None:
        made(self, *given)
        plans.append(IssuedOperators(given[3]))

    def watched(self: Actions, step: Step) -> None:
        if not step.lane.of_accelerator:
            act(self, step)
            return
        with Counting() as mode:
            act(self, step)
        if step.kind is StepKind.PROJECT and step.unit not in bound:
            bound.add(step.unit)
            return
        phase = "" if step.on_weights else "prefill" if step.micro_batch.is_prefill else "decode"
        found.setdefault((phase, step.kind), []).append((mode.number, plans[-1].of(step)))

    @contextlib.contextmanager
    def watching() -> Iterator[None]:
        with mock.patch.object(Actions, "__init__", init), mock.patch.object(Actions, "act", watched):
            yield

    host_counts.run(host_counts.Case(policy), shape, folder, watching)
    return found
