"""What an accelerator is given for a whole decode pass of one micro-batch, embedding and head among it: launches, with
and without graphs (``fake_graphs.py``); and whether passes wait for each other.

Tiny models as in ``host_counts.py``. A pass that is counted is one of those after its graphs were recorded.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from fake_graphs import FakeCapture
from host_counts import BATCH, Case, count_kernels, run, tiny_opt
from torch.utils._python_dispatch import TorchDispatchMode

from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.tiers import Lane
from flexgen_bench.engine import graphs
from flexgen_bench.engine import lane as lane_module
from flexgen_bench.engine.actions import Actions
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.job_run import JobRun
from flexgen_bench.schedule.steps import Step, StepKind

STEADY = 4  # tokens: two passes as they are, and one that is recorded, come before


@dataclass(frozen=True)
class PassCounts:
    """Of a decode pass of one micro-batch: launches (graphs, kernels and copies) and steps; how many of all passes were
    submitted only when the host had the tokens of the one before; and how many units' weights are moved or unpacked in
    a pass."""

    launches: float
    steps: float
    waits: int
    fetched: int


def count_pass(case: Case, folder: Path, with_graphs: bool, shape: ModelShape | None = None) -> PassCounts:
    """Of a case whose sequences are one micro-batch."""
    one = replace(case, policy=replace(case.policy, gpu_batch_size=2 * BATCH, num_gpu_batches=1))
    meter = _Meter()
    with meter.watching(with_graphs):
        run(one, shape or tiny_opt(), folder)
    counted = meter.counted
    return PassCounts(
        counted["launches"] / counted["passes"],
        counted["steps"] / counted["passes"],
        counted["waits"],
        len(meter.fetched),
    )


class _Meter:
    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()
        self.fetched: set[int] = set()
        self._captures: list[FakeCapture] = []
        self._guard = threading.Lock()

    def add(self, what: str, count: int) -> None:
        """From any lane: several launch at once, and what two count at the same time is two."""
        with self._guard:
            self.counted[what] += count

    @property
    def replayed(self) -> int:
        return sum(capture.launches for capture in self._captures)

    @contextlib.contextmanager
    def watching(self, with_graphs: bool) -> Iterator[None]:
        meter, act, finish = self, Actions.act, JobRun._finish

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                if _is_steady(meter.now.get(self)):
                    meter.add("launches", count_kernels(func, args, out))
                return out

        def context(worker: lane_module.LaneWorker) -> Mode:
            mode = Mode()  # type: ignore[no-untyped-call]
            meter.modes[worker._thread.name] = mode
            return mode

        def watched(self: Actions, step: Step) -> None:
            mode = meter.modes.get(f"lane-{step.lane}")
            if step.on_weights:
                meter.fetched.add(step.unit)
            before = meter.replayed
            if mode is not None:
                meter.now[mode] = step
            act(self, step)
            if mode is not None:
                meter.now[mode] = None
            if _is_steady(step):
                if step.lane is Lane.GPU:  # others go on meanwhile
                    meter.add("launches", meter.replayed - before)
                meter.add("steps", 1)
                meter.add("passes", step.kind is StepKind.EMBED)

        def capture() -> FakeCapture:
            meter._captures.append(FakeCapture())
            return meter._captures[-1]

        def finished(self: JobRun, one: Any) -> None:
            meter.add("waits", not self._submitted and not self._scheduler.is_done)
            finish(self, one)

        self.now: dict[Any, Step | None] = {}
        self.modes: dict[str, Any] = {}
        with (
            mock.patch.object(lane_module.LaneWorker, "_context", context),
            mock.patch.object(Actions, "act", watched),
            mock.patch.object(JobRun, "_finish", finished),
            mock.patch.object(Device, "records_graphs", with_graphs),
            mock.patch.object(graphs, "CudaCapture", capture),
        ):
            yield


def _is_steady(step: Step | None) -> bool:
    return step is not None and not step.on_weights and step.token >= STEADY
