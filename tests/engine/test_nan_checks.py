"""What is watched on an accelerator is judged with the logits of its own micro-batch."""

from __future__ import annotations

import pytest
import torch

import flexgen_bench.engine.device as device_module
import flexgen_bench.engine.nan_checks as health_module
from flexgen_bench.core.errors import NotFinite
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.tiers import Lane
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.nan_checks import Health
from flexgen_bench.schedule.steps import Step, StepKind


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU, as does all that is computed from it."""

    is_cuda = True  # type: ignore[assignment]


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What was marked as used by another stream than its own."""
    found: list[torch.Tensor] = []

    def mark(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    monkeypatch.setattr(health_module, "crossing", mark)
    monkeypatch.setattr(device_module, "crossing", lambda tensor: tensor)
    return found


def values(number: float) -> torch.Tensor:
    return torch.full((2, 3), number).as_subclass(OnGpu)


HEALTH_STEP = Step(Lane.GPU, StepKind.HEAD, 1)
HOST = HardwareProfile("cpu", Accelerator.NONE)


def test_sums_are_marked_before_another_stream_reads_them(marked: list[torch.Tensor]) -> None:
    """MOVE_LOGITS joins them on the stream of its lane. Unmarked, their memory went back to the stream that computes,
    which could write to it before they were read: finite values were reported as NaN."""
    health = Health(Device.open(HOST, 1))
    health.watch(HEALTH_STEP, values(1), values(2))
    health.watch_head(HEALTH_STEP, values(3), values(4))
    health.move(HEALTH_STEP)
    assert [tensor.tolist() for tensor in marked] == [[6, 12], [18, 24]]
    health.judge(HEALTH_STEP)


def test_a_micro_batch_does_not_take_what_the_next_one_of_its_stage_is_watched_for(marked: list[torch.Tensor]) -> None:
    """The head of the next micro-batch may have been issued when the host samples from this one's logits. What was
    watched of it used to be dropped then."""
    health = Health(Device.open(HOST, 1))
    health.watch_head(HEALTH_STEP, values(1), values(1))
    health.move(HEALTH_STEP)
    health.watch_head(HEALTH_STEP, values(1), values(torch.nan))
    health.judge(HEALTH_STEP)
    health.move(HEALTH_STEP)
    with pytest.raises(NotFinite):
        health.judge(HEALTH_STEP)
