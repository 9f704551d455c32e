"""What is watched on an accelerator is judged with the logits of its own micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import flexgen_bench.engine.device as device_module
import flexgen_bench.engine.next_tokens as next_tokens_module
from flexgen_bench.core.errors import NotFinite
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.tiers import Lane
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.nan_checks import Health
from flexgen_bench.engine.next_tokens import NextTokens
from flexgen_bench.schedule.micro_batch import NO_MICRO_BATCH
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

    for module in (device_module, next_tokens_module):
        monkeypatch.setattr(module, "crossing", mark)
    return found


def values(number: float) -> torch.Tensor:
    return torch.full((2, 3), number).as_subclass(OnGpu)


HEALTH_STEP = Step(Lane.GPU, StepKind.HEAD, 1)
HOST = HardwareProfile("cpu", Accelerator.NONE)


class Asked:
    """A consumer that wants the logits as they are."""

    def reduce(self, micro_batch: object, head: object, x: torch.Tensor) -> torch.Tensor:
        return x

    def finish(self, micro_batch: object, reduced: torch.Tensor) -> None: ...


@pytest.fixture
def tokens() -> tuple[Health, NextTokens]:
    health = Health()
    return health, NextTokens(Device.open(HOST, 1), health, Asked(), None)  # type: ignore[arg-type]


def test_sums_are_marked_before_another_stream_reads_them(
    marked: list[torch.Tensor], tokens: tuple[Health, NextTokens]
) -> None:
    """MOVE_LOGITS reads them on the stream of its lane. Unmarked, their memory went back to the stream that computes,
    which could write to it before they were read: finite values were reported as NaN."""
    health, following = tokens
    health.watch(HEALTH_STEP, values(1), values(2))
    health.watch_head(HEALTH_STEP, values(3), values(4))
    following.head(HEALTH_STEP, lambda x: x, values(5))
    following.move_logits(HEALTH_STEP)
    found = [tensor.flatten().tolist() for tensor in marked]
    assert found[:2] == [[6, 12], [18, 24]]
    assert [5] * 6 in found
    following.sample(HEALTH_STEP)


def test_a_micro_batch_does_not_take_what_the_next_one_of_its_stage_is_watched_for(
    marked: list[torch.Tensor], tokens: tuple[Health, NextTokens]
) -> None:
    """The layers of the next micro-batch, or pass, may have been issued when what this one was watched for is moved and
    judged. What was watched of it used to be dropped then."""
    health, following = tokens
    health.watch_head(HEALTH_STEP, values(1), values(1))
    following.head(HEALTH_STEP, lambda x: x, values(1))
    health.watch_head(HEALTH_STEP, values(1), values(torch.nan))
    following.move_logits(HEALTH_STEP)
    following.sample(HEALTH_STEP)
    following.head(HEALTH_STEP, lambda x: x, values(1))
    following.move_logits(HEALTH_STEP)
    with pytest.raises(NotFinite):
        following.sample(HEALTH_STEP)


class Shape:
    """Stands in for ``StaticDecode``: what is kept lies where it was first."""

    SUMS = 2
    where = slice(0, 2)

    def __init__(self) -> None:
        self._kept: dict[str, torch.Tensor] = {}
        self._work: Callable[[], None] | None = None

    def run(self, name: str, work: Callable[[], None]) -> None:
        self._work = self._work or work  # as it was recorded
        self._work()

    def keep(self, name: str, value: torch.Tensor) -> None:
        self._kept.setdefault(name, torch.empty_like(value)).copy_(value)

    def kept(self, name: str) -> torch.Tensor:
        return self._kept[name]


class Home:
    def put(self, where: slice, tokens: torch.Tensor) -> None: ...


def test_chunks_without_logits_are_judged_with_a_recorded_pass(marked: list[torch.Tensor]) -> None:
    """Sums of a chunk wait for the next head of its stage. They are no part of what was recorded for that one."""
    health = Health()
    sampled: list[list[int]] = []

    class Told(Asked):
        def choose(self, micro_batch: object, reduced: torch.Tensor) -> list[int]:
            sampled.append(reduced.tolist())
            return []

        def take(self, micro_batch: object, chosen: object) -> None: ...

    following = NextTokens(Device.open(HOST, 1), health, Told(), Home())  # type: ignore[arg-type]
    micro_batch = replace(NO_MICRO_BATCH, samples_on_device=True)
    step, shape = Step(Lane.GPU, StepKind.HEAD, 2, micro_batch), Shape()
    sums = values(1).flatten()[:4], values(1).flatten()[:2]
    for chunk in (None, 1.0, torch.nan):
        if chunk is not None:
            health.watch(step, values(chunk), values(1))
        health.watch_cache(step, sums[0].view(2, 2), [1, 2])
        health.watch_sums(step, sums[1])
        following.chosen(step, torch.tensor([7, 8]))
        following.sample(step, shape)  # type: ignore[arg-type]
        following.move_tokens(step)
        if chunk is not None and math.isnan(chunk):
            with pytest.raises(NotFinite):
                following.take([micro_batch])
        else:
            following.take([micro_batch])
    assert sampled == [[7, 8], [7, 8]]
