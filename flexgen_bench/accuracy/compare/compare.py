"""A mode against the uncompressed model, item by item: what changed, how sure that is, and whether it lies within a
stated margin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from flexgen_bench.accuracy.compare.statistics import (
    Difference,
    Discordance,
    Floats,
    Interval,
    bootstrap_p_value,
    discordance,
    holm,
    mean_of,
    mean_of_intervals,
    on_grid,
    paired_difference,
)
from flexgen_bench.core.accuracy import LOGLIK_DECIMALS, Item, TaskRecord
from flexgen_bench.core.digits import significant
from flexgen_bench.core.errors import UserError

# Two one-sided tests at 5 % each are one 90 % interval (Schuirmann 1987).
EQUIVALENCE_LEVEL, ALPHA = 0.9, 0.05
# Scores between 0 and 1, whose differences can be averaged and held against one margin.
_BOUNDED = ("mean", "f1")


@dataclass(frozen=True)
class Margins:
    """What counts as no loss. score: of accuracies, F1 and the like (0.02: two points). bits: added bits per byte of
    the right text."""

    score: float = 0.02
    bits: float = 0.02

    def __post_init__(self) -> None:
        for name in ("score", "bits"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise UserError(f"margin.{name}", value, "a number above 0 and below 1")

    def __str__(self) -> str:
        score, bits = significant(100 * self.score, 6), significant(self.bits, 6)
        return f"±{score} points, ±{bits} bits per byte"


class Verdict(StrEnum):
    """What the items say of one task, or of all."""

    EQUIVALENT = "equivalent"  # the interval lies inside the margin
    WORSE = "worse"  # a loss that chance does not explain, and that may exceed the margin
    BETTER = "better"
    UNDECIDED = "undecided"  # too few items to say either


@dataclass(frozen=True)
class TaskComparison:
    """One task under a mode and under the reference, on the items that both have.

    change: of the score, 95 %. sure: the interval the verdict was made with, 90 %; likely: the same at 95 %. bits:
    added bits per byte of the right texts, 95 % (None where nothing was scored). lost, won: items right in one run
    alone. p: McNemar's exact test, or the bootstrap's where an item is not just right or wrong; p_holm: adjusted for
    all tasks of the mode. same_predictions: items with the same answer. bounded: whether the score lies between 0 and
    1. left_out: items that one of the runs could not score, which are in neither side. silent: whether neither run got
    anything right, so that nothing could be lost. difference: with the sign that makes better positive.
    """

    task: str
    metric: str
    n: int
    unpaired: int
    reference: float
    score: float
    change: Interval
    likely: Interval
    sure: Interval
    bits: Interval | None
    bits_reference: float | None
    lost: int | None
    won: int | None
    p: float
    p_holm: float
    same_predictions: int
    identical: bool
    verdict: Verdict
    truncated: int
    left_out: int
    bounded: bool
    silent: bool
    difference: Difference
    bits_difference: Difference | None


@dataclass(frozen=True)
class ModeComparison:
    """All tasks of a mode. score: the mean change of scores between 0 and 1 (95 %), each task counting the same, better
    is positive; bits: the mean of added bits per byte. sure, verdict: of the mean change of scores; of bits where no
    task has a score."""

    tasks: Sequence[TaskComparison]
    margins: Margins
    score: Interval | None
    bits: Interval | None
    sure: Interval | None
    verdict: Verdict

    @property
    def worst(self) -> TaskComparison | None:
        """The bounded task that lost most."""
        bounded = [t for t in self.tasks if t.bounded]
        return min(bounded, key=lambda t: t.difference.value, default=None)

    def having(self, verdict: Verdict) -> list[str]:
        """The tasks with this verdict."""
        return [t.task for t in self.tasks if t.verdict is verdict]


def compare_modes(
    reference: Mapping[str, TaskRecord], candidate: Mapping[str, TaskRecord], margins: Margins
) -> ModeComparison:
    """Every task that both have, by name. Raises UserError if two records of a task are not comparable."""
    names = [name for name in candidate if name in reference]
    return combined([compare_task(reference[n], candidate[n], margins) for n in names], margins)


def combined(comparisons: Sequence[TaskComparison], margins: Margins) -> ModeComparison:
    """The tasks of one mode together; p values are adjusted for their number."""
    adjusted = holm({t.task: t.p for t in comparisons})
    tasks = [replace(t, p_holm=adjusted[t.task], verdict=_verdict(t, adjusted[t.task], margins)) for t in comparisons]
    scored = [t for t in tasks if t.bounded and not t.silent]
    bits = [t.bits_difference for t in tasks if t.bits_difference is not None]
    mean_score = mean_of_intervals([t.likely for t in scored]) if scored else None
    mean_bits = mean_of(bits) if bits else None
    sure = mean_of_intervals([t.sure for t in scored]) if scored else None
    if scored:
        assert sure is not None
        verdict = _of_interval(sure, margins.score, better_is_up=True)
    elif bits:
        sure = mean_of(bits, EQUIVALENCE_LEVEL)
        verdict = _of_interval(sure, margins.bits, better_is_up=False)
    else:
        verdict = Verdict.UNDECIDED
    return ModeComparison(tasks, margins, mean_score, mean_bits, sure, verdict)


def compare_task(reference: TaskRecord, candidate: TaskRecord, margins: Margins) -> TaskComparison:
    """One task. Raises UserError for records of other weights, another version of the task or other data, or without a
    common item."""
    _check(reference, candidate)
    mine = {item.id: item for item in candidate.items}
    pairs = [(item, mine[item.id]) for item in reference.items if item.id in mine]
    if not pairs:
        raise UserError(
            f"items of {candidate.task}", len(mine), "in part those of the reference", "Run both with one limit."
        )
    before, after = on_grid(*(_parts([pair[i] for pair in pairs]) for i in (0, 1)))
    clusters = [item.cluster or item.id for item, _ in pairs]
    statistic = reference.statistic
    difference = paired_difference(before, after, statistic, clusters)
    bits = _bits(pairs, clusters)
    bounded = statistic in _BOUNDED
    pair = discordance(before[:, 0], after[:, 0]) if statistic == "mean" else None
    # An F1 counts hits, false alarms and misses: an item is right if it is neither of the last two.
    flips = discordance(*(1 - part[:, 1:].sum(1) for part in (before, after))) if statistic == "f1" else pair
    better = difference if reference.higher_is_better else _negated(difference)
    sure = _wide(better, flips, EQUIVALENCE_LEVEL)
    if not bounded and bits is not None:
        sure = bits.interval(EQUIVALENCE_LEVEL)
    p = pair.p_value if pair is not None else bootstrap_p_value(difference)
    unverified = TaskComparison(
        task=candidate.task,
        metric=reference.metric,
        n=len(pairs),
        unpaired=len(reference.items) + len(candidate.items) - 2 * len(pairs),
        reference=difference.reference,
        score=difference.candidate,
        change=difference.interval(),
        likely=_wide(better, flips, difference.interval().level),
        sure=sure,
        bits=None if bits is None else bits.interval(),
        bits_reference=None if bits is None else bits.reference,
        lost=None if pair is None else pair.lost,
        won=None if pair is None else pair.won,
        p=p,
        p_holm=p,
        same_predictions=sum(a.prediction == b.prediction for a, b in pairs),
        identical=_identical(pairs),
        verdict=Verdict.UNDECIDED,
        truncated=sum(candidate.truncated.values()),
        left_out=len({*reference.left_out, *candidate.left_out}),
        bounded=bounded,
        silent=bounded and difference.reference == difference.candidate == 0,
        difference=better,
        bits_difference=bits,
    )
    return replace(unverified, verdict=_verdict(unverified, p, margins))


def _check(reference: TaskRecord, candidate: TaskRecord) -> None:
    for what, a, b in (
        ("task", reference.task, candidate.task),
        ("weights", reference.subject.fingerprint, candidate.subject.fingerprint),
        ("task version", reference.task_version, candidate.task_version),
        ("data", dict(reference.data_sha256), dict(candidate.data_sha256)),
        ("metric", reference.metric, candidate.metric),
        ("statistic", reference.statistic, candidate.statistic),
    ):
        if a != b:
            raise UserError(
                f"{what} of {candidate.task}", b, f"{a}, as in the reference", "Run both again (rerun=true)."
            )


def _parts(items: Sequence[Item]) -> Floats:
    return np.array([item.parts for item in items], dtype=np.float64)


def _gold(item: Item) -> tuple[float, float] | None:
    if item.gold is None or not item.loglik:
        return None
    return -item.loglik[item.gold], float(max(item.bytes[item.gold], 1))


def _bits(pairs: Sequence[tuple[Item, Item]], clusters: Sequence[str]) -> Difference | None:
    """Of the right texts; items whose right text was not scored are left out, and those with probability 0."""
    kept: list[tuple[tuple[float, float], tuple[float, float], str]] = []
    for (a, b), cluster in zip(pairs, clusters, strict=True):
        first, second = _gold(a), _gold(b)
        if first and second and math.isfinite(first[0]) and math.isfinite(second[0]):
            kept.append((first, second, cluster))
    if not kept:
        return None
    before, after = (np.array([k[i] for k in kept], dtype=np.float64) for i in (0, 1))
    return paired_difference(before, after, "bits", [k[2] for k in kept])


def _identical(pairs: Sequence[tuple[Item, Item]]) -> bool:
    """Whether all log-likelihoods are the same, or all texts where nothing was scored."""
    return all(_kept(a) == _kept(b) and (a.loglik or a.prediction == b.prediction) for a, b in pairs)


def _kept(item: Item) -> list[float]:
    """Log-likelihoods with the digits that are kept of them."""
    return [round(value, LOGLIK_DECIMALS) for value in item.loglik]


def _wide(difference: Difference, pair: Discordance | None, level: float) -> Interval:
    """The bootstrap's interval; where items are right or wrong no narrower than Tango's."""
    bootstrap = difference.interval(level)
    if pair is None:
        return bootstrap
    other = pair.tango(difference.n, level)
    return replace(bootstrap, low=min(bootstrap.low, other.low), high=max(bootstrap.high, other.high))


def _verdict(task: TaskComparison, p: float, margins: Margins) -> Verdict:
    margin = margins.score if task.bounded else margins.bits
    if task.silent or (not task.bounded and task.bits is None):  # nothing that the margin speaks of
        return Verdict.UNDECIDED
    if task.sure.inside(margin):
        return Verdict.EQUIVALENT
    if p >= ALPHA:
        return Verdict.UNDECIDED
    if task.bounded:
        return Verdict.BETTER if task.difference.value > 0 else Verdict.WORSE
    assert task.bits is not None
    return Verdict.BETTER if task.bits.value < 0 else Verdict.WORSE


def _of_interval(sure: Interval, margin: float, *, better_is_up: bool) -> Verdict:
    if sure.inside(margin):
        return Verdict.EQUIVALENT
    if sure.low > 0:
        return Verdict.BETTER if better_is_up else Verdict.WORSE
    if sure.high < 0:
        return Verdict.WORSE if better_is_up else Verdict.BETTER
    return Verdict.UNDECIDED


def _negated(difference: Difference) -> Difference:
    return replace(
        difference, reference=-difference.reference, candidate=-difference.candidate, draws=-difference.draws
    )
