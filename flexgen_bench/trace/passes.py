"""Where the passes of a run lie in time, read off the lane that computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from flexgen_bench.core.timeline import Slice, Timeline
from flexgen_bench.schedule.steps import StepKind


@dataclass(frozen=True)
class Pass:
    """One sweep over all units. number: from 1; prefills, decodes: whether it holds prompt tokens, or later ones."""

    number: int
    begin_s: float
    end_s: float
    prefills: bool
    decodes: bool

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s


def find_passes(timeline: Timeline) -> list[Pass]:
    """The passes, in order. A pass ends where the next one begins to compute, the last one with its last step.

    A new pass begins where the lane that embeds comes back to the embedding, unit 0.
    """
    computed = next((steps for lane in timeline.lanes.values() if (steps := _of_batches(list(lane)))), [])
    starts = [i for i, s in enumerate(computed) if i == 0 or s.unit == 0 < computed[i - 1].unit]
    groups = [computed[a:b] for a, b in pairwise([*starts, len(computed)])]
    ends = [group[0].begin_s for group in groups[1:]] + [g[-1].end_s for g in groups[-1:]]
    return [
        Pass(
            number,
            group[0].begin_s,
            end,
            prefills=any(s.token == 0 for s in group),
            decodes=any(s.token > 0 for s in group),
        )
        for number, (group, end) in enumerate(zip(groups, ends, strict=True), start=1)
    ]


def typical(passes: Sequence[Pass]) -> list[Pass]:
    """The passes worth a closer look: the first prefill, and a decode pass from the middle (a mixed one if need be)."""
    prefill = next((p for p in passes if p.prefills), None)
    decoding = [p for p in passes if not p.prefills] or [p for p in passes if p.decodes]
    decode = decoding[len(decoding) // 2] if decoding else None
    return list(dict.fromkeys(p for p in (prefill, decode) if p is not None))


def _of_batches(slices: list[Slice]) -> list[Slice]:
    """The steps of micro-batches on a lane that embeds; nothing for another lane."""
    if not any(s.kind == StepKind.EMBED for s in slices):
        return []
    # The cpu lane also gathers rows for an accelerator, but embeds only where it computes.
    return [s for s in slices if s.micro_batch_index >= 0 and s.kind != StepKind.GATHER_ROWS]
