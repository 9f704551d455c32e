"""Statistics of paired items: bootstrap intervals of differences, McNemar's test, Tango's interval, Holm's correction.

N items, K parts. A score of a task is a function of sums over its items (a mean, a ratio of sums, an F1 of counts), so
an item is its K addends, and a resample of the items is one matrix product. Addends lie on a grid on which these sums
are exact (``on_grid``), so every processor and every library of matrix products finds the same sums, in whatever order
it adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

Floats = NDArray[np.float64]
SEED = 20230613
RESAMPLES = 4000
# Resamples drawn at once: bounds the matrix of counts at about 40 MB for 10,000 items.
_AT_ONCE = 512
# Up to this many items all resamples are kept: many runs of one task, and tasks of one size, share them.
_KEPT_ITEMS = 2000
# Bits of an addend, relative to the largest of its column: an error of 1.2e-10 of that one, far above what float64
# leaves of noise. Fewer where there are so many items that their sum would need more than the 53 bits of a float64.
# Spare: a resample that draws a large cluster often has more items.
_GRID_BITS, _FLOAT_BITS, _SPARE_BITS = 32, 53, 6


def _ratio(sums: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def _f1(sums: Floats) -> Floats:
    hits, wrong = sums[..., 0], sums[..., 1] + sums[..., 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(hits + wrong > 0, 2 * hits / (2 * hits + wrong), 0.0)


# From the sums of the items' addends (..., K) to the score (...):
#   mean: (value, 1). exp_ratio: (-log-likelihood, tokens, words or bytes), a perplexity. bits: (-log-likelihood,
# bytes).   f1: (true positives, false positives, false negatives).
STATISTICS: Mapping[str, Callable[[Floats], Floats]] = {
    "mean": _ratio,
    "exp_ratio": lambda sums: np.exp(_ratio(sums)),
    "bits": lambda sums: _ratio(sums) / math.log(2),
    "f1": _f1,
}


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval at the stated level."""

    value: float
    low: float
    high: float
    level: float = 0.95

    def inside(self, margin: float) -> bool:
        """Whether the whole interval lies within +-margin."""
        return -margin < self.low and self.high < margin


@dataclass(frozen=True)
class Difference:
    """Candidate minus reference on the same items. draws: the bootstrap's differences, for sums over several tasks."""

    reference: float
    candidate: float
    n: int
    draws: Floats

    @property
    def value(self) -> float:
        return self.candidate - self.reference

    def interval(self, level: float = 0.95) -> Interval:
        """The percentile interval; resamples in which the score is not defined are left out."""
        known = self.draws[np.isfinite(self.draws)]
        if not len(known):
            return Interval(self.value, math.nan, math.nan, level)
        low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
        return Interval(self.value, float(low), float(high), level)


def on_grid(*tables: Floats) -> list[Floats]:
    """Tables of addends (N, K), each rounded to a multiple of one power of two per column, the same for all tables. A
    sum over N of them, some taken several times, is then exact.

    So sums do not depend on their order, equal addends stay equal, and 0.9999999999999999 is 1.
    """
    exponents = np.max([_exponents(table) for table in tables], axis=0)
    bits = min(_GRID_BITS, _FLOAT_BITS - _SPARE_BITS - math.ceil(math.log2(max(2, len(tables[0])))))
    step = np.exp2(exponents - bits)
    return [np.where(np.isfinite(t), np.rint(t / step) * step, t) + 0.0 for t in tables]


def _exponents(table: Floats) -> Floats:
    """Of each column's largest finite value, as ``frexp``; a neighbour of a power of two counts as that, and next to
    nothing as 2**-100."""
    finite = np.where(np.isfinite(table), np.abs(table), 0.0)
    largest = np.maximum(finite.max(axis=0), 2.0**-100)
    exponents: Floats = np.frexp(largest * (1 + 2.0**-40))[1].astype(np.float64)
    return exponents


def score(parts: Floats, statistic: str) -> float:
    """The score of items' addends (N, K)."""
    (exact,) = on_grid(parts)
    return float(STATISTICS[statistic](exact.sum(axis=0)))


def paired_difference(
    reference: Floats,
    candidate: Floats,
    statistic: str,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Difference:
    """Bootstrap of the difference (Efron 1979): the same resample of items for both.

    reference, candidate: addends (N, K) of the same items in the same order. clusters: whole clusters are drawn instead
    of items (subjects of an exam, whose questions are alike). The same input gives the same draws.
    """
    if reference.shape != candidate.shape or not len(reference):
        raise ValueError(f"not the same items: {reference.shape} and {candidate.shape}")
    of = STATISTICS[statistic]
    reference, candidate = on_grid(reference, candidate)
    both = np.concatenate([reference, candidate], axis=1)
    if clusters is not None and len(set(clusters)) > 1:
        both = _summed(both, clusters)
    units, k = len(both), reference.shape[1]
    draws = []
    for counts in _resamples(units, resamples, seed):
        sums = counts @ both
        draws.append(of(sums[:, k:]) - of(sums[:, :k]))
    return Difference(score(reference, statistic), score(candidate, statistic), len(reference), np.concatenate(draws))


def _resamples(units: int, resamples: int, seed: int) -> Iterable[Floats]:
    """How often each item is drawn, (resamples in pieces, units)."""
    return _kept(units, resamples, seed) if units <= _KEPT_ITEMS else _drawn(units, resamples, seed)


@lru_cache(maxsize=4)
def _kept(units: int, resamples: int, seed: int) -> list[Floats]:
    return list(_drawn(units, resamples, seed))


def _drawn(units: int, resamples: int, seed: int) -> Iterator[Floats]:
    random = np.random.default_rng(seed)
    for start in range(0, resamples, _AT_ONCE):
        count = min(_AT_ONCE, resamples - start)
        yield random.multinomial(units, np.full(units, 1 / units), size=count).astype(np.float64)


def _summed(parts: Floats, clusters: Sequence[Hashable]) -> Floats:
    places = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(places), parts.shape[1]))
    np.add.at(sums, [places[c] for c in clusters], parts)
    return sums


@dataclass(frozen=True)
class Discordance:
    """Items that only one of two runs got right."""

    lost: int  # right in the reference alone
    won: int  # right in the candidate alone

    @property
    def p_value(self) -> float:
        """McNemar's exact test (two-sided binomial): could lost and won be chance if both are equally good?"""
        fewer = float(special.bdtr(min(self.lost, self.won), self.lost + self.won, 0.5))
        return min(1.0, 2 * fewer)

    def tango(self, n: int, level: float) -> Interval:
        """Tango's score interval (1998, Statistics in Medicine 17:891) of (won - lost) / n.

        Unlike the bootstrap's it has a width where few items or none differ: 60 equal answers do not prove equality.
        """
        z = float(special.ndtri((1 + level) / 2))
        value = (self.won - self.lost) / n

        def score_at(d: float) -> float:
            a = 2.0 * n
            b = -self.won - self.lost + (2 * n - self.won + self.lost) * d
            c = -self.lost * d * (1 - d)
            q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
            variance = n * (2 * q + d * (1 - d))
            distance = self.won - self.lost - n * d
            if variance <= 0:
                return 0.0 if distance == 0 else math.copysign(math.inf, distance)
            return distance / math.sqrt(variance)

        low = _root(lambda d: score_at(d) - z, -1.0, value)
        high = _root(lambda d: score_at(d) + z, value, 1.0)
        return Interval(value, low, high, level)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function crosses 0, by bisection; the nearer end if it does not."""
    if function(low) <= 0:
        return low
    if function(high) >= 0:
        return high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2


def discordance(reference: Floats, candidate: Floats) -> Discordance | None:
    """Of right-or-wrong values (N,); None if they are anything else."""
    if not np.isin(reference, (0.0, 1.0)).all() or not np.isin(candidate, (0.0, 1.0)).all():
        return None
    return Discordance(
        int(((reference == 1) & (candidate == 0)).sum()), int(((reference == 0) & (candidate == 1)).sum())
    )


def bootstrap_p_value(difference: Difference) -> float:
    """Two-sided: twice the share of resamples on the other side of 0, never below what their number can tell."""
    known = difference.draws[np.isfinite(difference.draws)]
    if not len(known):
        return 1.0
    smaller = min(float((known <= 0).mean()), float((known >= 0).mean()))
    return min(1.0, max(2 * smaller, 1 / (len(known) + 1)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment (1979): the chance of any false alarm among all of them stays below the level."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    ordered = sorted(p_values, key=lambda name: (p_values[name], name))
    for rank, name in enumerate(ordered):
        largest = max(largest, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def mean_of_intervals(intervals: Sequence[Interval]) -> Interval:
    """The interval of the mean of independent estimates from their own intervals (MOVER: Zou and Donner 2008,
    Statistics in Medicine 27:1693).

    Keeps the width of those that a bootstrap of few differing items would not have.
    """
    n = len(intervals)
    value = math.fsum(i.value for i in intervals) / n
    below = math.sqrt(math.fsum((i.value - i.low) ** 2 for i in intervals)) / n
    above = math.sqrt(math.fsum((i.high - i.value) ** 2 for i in intervals)) / n
    return Interval(value, value - below, value + above, intervals[0].level)


def mean_of(differences: Sequence[Difference], level: float = 0.95) -> Interval:
    """The mean difference of several tasks, each counting the same; tasks are independent, their draws are averaged."""
    count = min(len(d.draws) for d in differences)
    draws = mean_draws([d.draws[:count] for d in differences])
    value = math.fsum(d.value for d in differences) / len(differences)
    known = draws[np.isfinite(draws)]
    if not len(known):
        return Interval(value, math.nan, math.nan, level)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)


def mean_draws(draws: Sequence[Floats]) -> Floats:
    """The mean of several tasks' draws, task by task in the order of adding: (D,)."""
    total = np.zeros(len(draws[0]))
    for one in draws:
        total = total + one
    return total / len(draws)
