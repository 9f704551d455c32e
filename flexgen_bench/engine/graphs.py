"""CUDA graphs: work that a lane issues again and again is recorded once, and then launched as one."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from typing import Protocol

import torch

from flexgen_bench.core.instructions import GRAPHS_SWITCH
from flexgen_bench.engine.device import Device

_log = logging.getLogger(__name__)
Work = Callable[[], None]  # issues operators on tensors that stay where they are, and looks at none of their values


class Capture(Protocol):
    """How work is recorded."""

    def record(self, work: Work) -> Work:
        """What does ``work`` again, as one launch. Nothing is carried out. Raises what tells that it cannot be
        recorded."""

    def settle(self) -> None:
        """Wait until what was launched is over: then it may be forgotten."""


class CudaCapture:
    """On the present stream, which is none but this lane's. Temporaries of all graphs share one pool of memory: no
    graph needs those of another, nor its own from one time to the next.

    ``thread_local``: other lanes allocate, and ask events, while this one records.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # that the recording is no good: the first error says why
                graph.capture_end()
            raise
        graph.capture_end()
        replay: Work = graph.replay
        return replay

    def settle(self) -> None:
        torch.cuda.current_stream().synchronize()


class Graphs:
    """What a job records. path: in words, how its decode passes are issued; for the record of a run."""

    def __init__(self, capture: Capture | None, reason: str = "") -> None:
        """reason: why nothing is recorded, where there is no capture."""
        self._capture, self._reason = capture, reason
        self.recorded = self.replayed = 0

    @property
    def is_on(self) -> bool:
        return self._capture is not None

    @property
    def path(self) -> str:
        if self.is_on and self.recorded:
            return f"decode passes: {self.recorded} CUDA graphs, launched {self.replayed} times"
        reason = self._reason or "nothing that is resident came often enough"
        return f"decode passes: every operator is launched ({reason})"

    def refuse(self, reason: str) -> None:
        """Nothing is to be recorded, for this reason, unless there was one before."""
        if self._capture is not None:
            self._capture, self._reason = None, reason

    def record(self, work: Work) -> Work | None:
        """What does ``work`` again; None if it cannot be recorded, and nothing will be from now on."""
        assert self._capture is not None
        try:
            replay = self._capture.record(work)
        except Exception as error:  # whatever a device, a driver or an operator has against it
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._capture, self._reason = None, f"a CUDA graph could not be recorded: {said}"
            _log.warning(
                "A CUDA graph could not be recorded (%s): every operator of a decode pass is launched by itself, which "
                "takes the host longer. Results are the same. %s=0 does not try.",
                said,
                GRAPHS_SWITCH,
            )
            return None
        self.recorded += 1
        return replay

    def settle(self) -> None:
        """Before graphs are forgotten."""
        if self._capture is not None:
            self._capture.settle()


def graphs_for(device: Device, has_room: bool, has_tokens: bool) -> Graphs:
    """Of a job on this device. has_room: for what graphs take beside the plan; has_tokens: its tokens stay there."""
    if not device.records_graphs:
        return Graphs(None, "the device records no graphs")
    if os.environ.get(GRAPHS_SWITCH) == "0":
        return Graphs(None, f"{GRAPHS_SWITCH}=0")
    if not has_tokens:
        where = "a table, the head or a layer is not computed where it lies on the accelerator, or another rank has it"
        return Graphs(None, where)
    if not has_room:
        return Graphs(None, "no room for graphs beside the plan")
    return Graphs(CudaCapture())
