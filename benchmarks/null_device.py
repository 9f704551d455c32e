"""A device that does nothing, and the time of the thread that issues a layer's work to it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from host_counts import OF_A_LAYER, Case, run, tiny_opt

from flexgen_bench.core.model import DType
from flexgen_bench.core.tiers import Lane
from flexgen_bench.engine import lane as lane_module
from flexgen_bench.engine.actions import Actions
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.executor import LaneSettings
from flexgen_bench.schedule.steps import Step, StepKind


class NullEvent:
    """An event of a device on which everything is over at once."""

    def record(self, stream: object) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: NullEvent) -> float:
        return 0.0


class NullStream:
    """A stream that does nothing."""

    def wait_event(self, event: NullEvent) -> None: ...

    def synchronize(self) -> None: ...


@dataclass(frozen=True)
class IssueTime:
    """Microseconds of the gpu lane's thread per layer and micro-batch in decode passes: in its actions, and with all
    that is around them."""

    actions_us: float
    lane_us: float


class _Clock:
    """Of the gpu lane's thread, from its first decode step on."""

    def __init__(self) -> None:
        self.actions_ns = self.lane_ns = self.layers = 0
        self._began_ns: int | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        act, work, clock = Actions.act, lane_module.LaneWorker._work, self

        def timed(actions: Actions, step: Step) -> None:
            if step.lane is not Lane.GPU or step.on_weights or step.micro_batch.is_prefill:
                act(actions, step)
                return
            begin = time.thread_time_ns()
            clock._began_ns = clock._began_ns or begin
            act(actions, step)
            if step.kind in OF_A_LAYER:
                clock.actions_ns += time.thread_time_ns() - begin
                clock.layers += step.kind in (StepKind.LAYER, StepKind.PROJECT)

        def whole(worker: lane_module.LaneWorker) -> None:
            work(worker)
            if worker.lane is Lane.GPU and clock._began_ns is not None:
                clock.lane_ns = time.thread_time_ns() - clock._began_ns

        with mock.patch.object(Actions, "act", timed), mock.patch.object(lane_module.LaneWorker, "_work", whole):
            yield

    def result(self) -> IssueTime:
        return IssueTime(self.actions_ns / self.layers / 1e3, self.lane_ns / self.layers / 1e3)


def issue_time(case: Case, folder: Path) -> IssueTime:
    """Of a small model in float32, whose operators take next to no time themselves."""
    clock = _Clock()
    with null_device():
        run(case, tiny_opt(wide=False), folder, clock.running, DType.FLOAT32)
    return clock.result()


@contextlib.contextmanager
def null_device() -> Iterator[None]:
    """Lanes of an accelerator issue to streams that do nothing; operators are carried out where they are issued."""
    settings = Device.lane_settings

    def streams(self: Device, network: bool = False) -> dict[Lane, LaneSettings]:
        return {
            lane: LaneSettings(own.threads, stream=NullStream()) if lane.of_accelerator else own  # type: ignore[arg-type]
            for lane, own in settings(self, network).items()
        }

    def event(**_: object) -> NullEvent:
        return NullEvent()

    def stream(_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    with (
        mock.patch.object(Device, "lane_settings", streams),
        mock.patch.object(torch.cuda, "Event", event),
        mock.patch.object(torch.cuda, "stream", stream),
    ):
        yield
