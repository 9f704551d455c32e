"""Recording what lanes do, always on: about half a microsecond and 45 bytes a step, up to a limit per job."""

from __future__ import annotations

from flexgen_bench.core.timeline import ROW, LaneTimeline
from flexgen_bench.schedule.steps import Step, StepKind

# Steps kept of one job: 23 MB. A longer job keeps its beginning, which shows what it does over and over.
MAX_STEPS = 500_000

KINDS = tuple(str(kind) for kind in StepKind)
_PLACES = {kind: place for place, kind in enumerate(StepKind)}


class StepBudget:
    """How many more steps a job's lanes may record. Two lanes may take the last place at once: no harm in that."""

    def __init__(self, steps: int = MAX_STEPS) -> None:
        self.steps = steps


class LaneLog:
    """What one lane did; written by one thread."""

    def __init__(self, budget: StepBudget) -> None:
        self._budget = budget
        self._rows = bytearray()
        self._dropped = 0

    def add(self, step: Step, begin_s: float, end_s: float) -> None:
        """Keep one step, with its times in seconds on the host's clock (``time.perf_counter``)."""
        if self._budget.steps <= 0:
            self._dropped += 1
            return
        self._budget.steps -= 1
        self._rows += ROW.pack(
            _PLACES[step.kind],
            step.unit,
            step.micro_batch_index,
            step.part,
            step.token,
            begin_s,
            end_s,
            step.bytes,
            step.flops,
        )

    def timeline(self, origin_s: float, bytes_per_s: float | None) -> LaneTimeline:
        """What was recorded so far; times count from ``origin_s``."""
        return LaneTimeline(bytes(self._rows), KINDS, origin_s, bytes_per_s, self._dropped)
