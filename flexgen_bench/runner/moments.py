"""Looks at a cell while it generates, seldom enough to cost nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from flexgen_bench.core.moment import JobState, Moment
from flexgen_bench.machine.probes import io_counters, resident_bytes
from flexgen_bench.runner.events import Emitter

# A look takes 0.2 ms, so this keeps it below a thousandth of the time of the thread that generates.
INTERVAL_S = 1.0


class Moments:
    """The progress of a cell's generations, as the System contract calls it: told as progress lines and, once in
    ``INTERVAL_S`` and at the end of each generation, as a ``Moment``.

    job_state: what the system says of its job; None where it does not.
    """

    def __init__(
        self, emitter: Emitter, job_state: Callable[[], JobState | None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._emitter, self._job_state, self._clock = emitter, job_state, clock
        self._stage = ""
        self._generation = 0
        self._first_s: float | None = None
        self._begin_s = self._next_s = 0.0
        self._read_before: int | None = None
        self._done: dict[str, int] = {}

    def begin(self, stage: str) -> None:
        """A generation begins."""
        self._stage, self._generation, self._done = stage, self._generation + 1, {}
        self._read_before = _storage_read_bytes()
        self._begin_s = self._clock()
        self._next_s = self._begin_s + INTERVAL_S
        if self._first_s is None:
            self._first_s = self._begin_s

    def tokens(self, phase: str, done: int, total: int) -> None:
        """``core.progress.Progress`` of the generation that has begun."""
        self._done[phase] = done
        self._emitter.tokens(phase, done, total)
        if self._clock() >= self._next_s:
            self._tell(self._job_state())

    def end(self) -> None:
        """The generation is over: one more look, so that the shortest has one. Its job may be gone."""
        self._tell(self._job_state())

    def _tell(self, job: JobState | None) -> None:
        now = self._clock()
        self._next_s = now + INTERVAL_S
        read, before = _storage_read_bytes(), self._read_before
        self._emitter.moment(
            Moment(
                stage=self._stage,
                generation=self._generation,
                time_s=now - (self._first_s or 0.0),
                elapsed_s=now - self._begin_s,
                prefill_tokens=self._done.get("prefill", 0),
                decode_tokens=self._done.get("decode", 0),
                resident_bytes=resident_bytes(),
                storage_read_bytes=None if read is None or before is None else read - before,
                gpu_bytes=_gpu_bytes(),
                job=job,
            )
        )


def _storage_read_bytes() -> int | None:
    counters = io_counters()
    return None if counters is None else counters.storage_read_bytes


def _gpu_bytes() -> int | None:
    torch = sys.modules.get("torch")  # a process without it has nothing there
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.memory_allocated())
