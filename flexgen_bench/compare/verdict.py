"""What the records of one cell say of B beside A: better, worse, the same within a margin, or undecided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from flexgen_bench.compare.pairs import Pair
from flexgen_bench.compare.ratio import Ratio, paired, unpaired
from flexgen_bench.core.metrics import DEFINITIONS, metrics, summarise
from flexgen_bench.core.record import Record
from flexgen_bench.core.status import Status
from flexgen_bench.report.cells import cause
from flexgen_bench.store.reader import StoredRecord

# Assumed: what processes of one program differ by on a quiet machine, and less than anybody would act on.
MARGIN = 0.03


class Verdict(StrEnum):
    """B beside A."""

    BETTER = "better"
    WORSE = "worse"
    SAME = "the same"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Judged:
    """A cell's verdict and why. values: the figure of A and of B, in ``unit``; None where there is none.

    notes: what a reader must know before believing it (another machine, other tokens).
    """

    pair: Pair
    verdict: Verdict
    why: str
    metric: str
    ratio: Ratio | None = None
    values: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


def judge(pair: Pair, metric: str, margin: float = MARGIN, *, rounds: bool = False) -> Judged:
    """The verdict on one cell by ``metric`` (a name of ``core.metrics.DEFINITIONS``).

    rounds: the n-th run of A and of B were made next to each other, so they are compared as pairs. Otherwise runs are
    compared where both sides have two or more, and the repetitions inside a run where not.
    """
    a, b = (_telling(side, rounds) for side in (pair.a, pair.b))
    notes = tuple(pair.differences) + _tokens_note(a, b)
    if pair.is_one:
        return Judged(pair, Verdict.SAME, "both sides hold the same runs", metric, notes=notes)
    if (a.status, b.status) != (Status.OK, Status.OK):
        verdict, why = _of_endings(a, b)
        return Judged(pair, verdict, why, metric, notes=notes)
    if a.evidence is not b.evidence:
        why = f"A is {a.evidence}, B is {b.evidence}: figures of two kinds"
        return Judged(pair, Verdict.UNDECIDED, why, metric, notes=notes)
    ratio = _ratio(pair, metric, rounds)
    values = (_middle(pair.ok_a, metric), _middle(pair.ok_b, metric))
    if ratio is None or values[0] is None or values[1] is None:
        why = f"{metric} is not defined for both"
        return Judged(pair, Verdict.UNDECIDED, why, metric, notes=notes)
    verdict, why = _of_ratio(ratio, DEFINITIONS[metric].higher_is_better, margin)
    return Judged(pair, verdict, why, metric, ratio, (values[0], values[1]), notes)


def _telling(runs: Sequence[StoredRecord], rounds: bool) -> Record:
    """The run whose ending counts: the newest, or of rounds made for this the first that failed."""
    failed = [stored.record for stored in runs if stored.record.status is not Status.OK] if rounds else []
    return failed[0] if failed else runs[-1].record


def _of_endings(a: Record, b: Record) -> tuple[Verdict, str]:
    """For records of which at least one is not OK."""
    if a.status is Status.OK:
        impossible = b.status is Status.UNAVAILABLE
        why = f"A ran, B ended in {b.status}: {cause(b.reason)}"
        return (Verdict.UNDECIDED if impossible else Verdict.WORSE), why
    if b.status is Status.OK:
        impossible = a.status is Status.UNAVAILABLE
        why = f"B ran, A ended in {a.status}: {cause(a.reason)}"
        return (Verdict.UNDECIDED if impossible else Verdict.BETTER), why
    return Verdict.UNDECIDED, f"neither ran: A ended in {a.status}, B in {b.status}"


def _of_ratio(ratio: Ratio, higher_is_better: bool, margin: float) -> tuple[Verdict, str]:
    if ratio.low is None or ratio.high is None:
        return Verdict.UNDECIDED, f"too few {ratio.of} for an interval: measure again, or use --rerun"
    least, most = 1 / (1 + margin), 1 + margin
    if ratio.low > most or ratio.high < least:
        grew = ratio.low > most
        verdict = Verdict.BETTER if grew is higher_is_better else Verdict.WORSE
        return verdict, "all of the interval is beyond the margin"
    if least <= ratio.low and ratio.high <= most:
        return Verdict.SAME, "all of the interval is within the margin"
    return Verdict.UNDECIDED, "the interval reaches across the margin"


def _ratio(pair: Pair, metric: str, rounds: bool) -> Ratio | None:
    if rounds:  # those in which both have the figure
        both = [(a, b) for a, b in zip(pair.ok_a, pair.ok_b, strict=True) if _pooled(a, metric) and _pooled(b, metric)]
        a, b = [x for x, _ in both], [y for _, y in both]
        return _of_values(a, b, lambda record: _pooled(record, metric), "rounds", paired)
    if min(len(pair.ok_a), len(pair.ok_b)) >= 2:
        return _of_values(pair.ok_a, pair.ok_b, lambda record: _pooled(record, metric), "runs", unpaired)
    return _of_values(pair.ok_a, pair.ok_b, lambda record: _each(record, metric), "repetitions", unpaired)


def _of_values(
    a: Sequence[Record],
    b: Sequence[Record],
    values: Callable[[Record], list[float]],
    of: str,
    interval: Callable[[Sequence[float], Sequence[float], str], Ratio],
) -> Ratio | None:
    sides = [[value for record in side for value in values(record)] for side in (a, b)]
    if not all(side and min(side) > 0 for side in sides):
        return None
    return interval(sides[0], sides[1], of)


def _pooled(record: Record, metric: str) -> list[float]:
    summary = summarise(record, metric)
    return [] if summary is None else [summary.value]


def _each(record: Record, metric: str) -> list[float]:
    known = metrics(record).get(metric)
    return [] if known is None else list(known.samples)


def _middle(records: Sequence[Record], metric: str) -> float | None:
    values = sorted(value for record in records for value in _pooled(record, metric))
    if not values:
        return None
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def _tokens_note(a: Record, b: Record) -> tuple[str, ...]:
    tokens = [record.outputs.get("token_ids") for record in (a, b)]
    if not all(isinstance(ids, list | tuple) and ids for ids in tokens):
        return ()
    first, second = [[list(ids) for ids in side] for side in tokens if side is not None]
    if first == second:
        return ()
    equal = sum(x == y for x, y in zip(first, second, strict=False))
    return (f"tokens differ: {equal} of {max(len(first), len(second))} prompts have the same",)
