"""Which setting to take: the smallest that lost no more than the margin, for sure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_bench.accuracy.compare.compare import ModeComparison, Verdict
from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.digits import fixed

# Of a value that is not compressed, where no record says: 16 bits.
UNCOMPRESSED_BYTES = 2.0


@dataclass(frozen=True)
class Candidate:
    """A mode with what it costs and what it lost. on_grid: its loss says nothing, the weights lay on its grid
    already."""

    mode: str
    lossy: Lossy
    bytes_per_weight: float | None
    comparison: ModeComparison | None
    on_grid: bool = False


@dataclass(frozen=True)
class Recommendation:
    """mode None: none of them; why says it in words."""

    mode: str | None
    why: str


def recommend(candidates: Sequence[Candidate]) -> Recommendation:
    """The mode with fewest bytes per weight (then per cached value, then values read) whose 90 % interval of the mean
    change lies inside the margin, and under which no task got worse. Only modes evaluated on the most tasks are judged:
    a mean over fewer is of other tasks."""
    judged = _on_most_tasks(candidates)
    if not judged:
        return Recommendation(None, "no compressed mode has been compared with the uncompressed model")
    good = [c for c in judged if _is_good(c) and not c.on_grid]
    if not good:
        best = min(judged, key=lambda c: (c.on_grid, _loss(c)))
        assert best.comparison is not None
        if all(c.comparison is None or c.comparison.score is None for c in judged):
            return Recommendation(None, "log-loss alone was evaluated: add tasks with right and wrong answers")
        return Recommendation(
            None,
            f"no mode is shown to stay within {best.comparison.margins}: stay with 16 bits, or evaluate more items; "
            f"nearest is {best.mode}",
        )
    chosen = min(good, key=_size)
    assert chosen.comparison is not None
    sure = chosen.comparison.sure
    assert sure is not None
    return Recommendation(
        chosen.mode,
        f"fewest bytes ({fixed(_size(chosen)[0], 2)} per weight) of the modes whose mean change lies within the margin "
        f"({fixed(100 * sure.low, 2, plus=True)} to {fixed(100 * sure.high, 2, plus=True)} points at 90 %), with no "
        "task that got worse",
    )


def _on_most_tasks(candidates: Sequence[Candidate]) -> list[Candidate]:
    compared = [c for c in candidates if c.comparison is not None and not c.lossy.is_exact]
    most = max((_tasks(c) for c in compared), default=0)
    return [c for c in compared if _tasks(c) == most]


def _tasks(candidate: Candidate) -> int:
    return len(candidate.comparison.tasks) if candidate.comparison is not None else 0


def _is_good(candidate: Candidate) -> bool:
    comparison = candidate.comparison
    return (
        comparison is not None
        and comparison.verdict in (Verdict.EQUIVALENT, Verdict.BETTER)
        and comparison.score is not None
        and not comparison.having(Verdict.WORSE)
    )


def _size(candidate: Candidate) -> tuple[float, float, float]:
    weights = candidate.bytes_per_weight
    kv = candidate.lossy.kv_cache
    per_value = UNCOMPRESSED_BYTES if kv is None else kv.bits / 8 + 4 / kv.group_size
    return (UNCOMPRESSED_BYTES if weights is None else weights), per_value, candidate.lossy.value_share


def _loss(candidate: Candidate) -> float:
    comparison = candidate.comparison
    return -comparison.score.value if comparison is not None and comparison.score is not None else float("inf")
