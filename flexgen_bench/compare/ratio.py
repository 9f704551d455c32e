"""How many times the figure of B is that of A, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """B over A. low, high: ends of the 95 % interval; None where there is no spread to tell it from.

    of: what was repeated ("runs", "repetitions", "rounds"); counts: how many of them A and B have.
    """

    value: float
    low: float | None
    high: float | None
    of: str
    counts: tuple[int, int]


def unpaired(a: Sequence[float], b: Sequence[float], of: str) -> Ratio:
    """Welch's interval for the difference of mean logarithms, so a ratio and its inverse say the same.

    Source: B. L. Welch, Biometrika 34 (1947), with Satterthwaite's degrees of freedom. All values are above zero.
    """
    log_a, log_b = [[math.log(v) for v in side] for side in (a, b)]
    middle = statistics.fmean(log_b) - statistics.fmean(log_a)
    counts = (len(a), len(b))
    if min(counts) < 2:
        return Ratio(math.exp(middle), None, None, of, counts)
    parts = [statistics.variance(side) / len(side) for side in (log_a, log_b)]
    squares = sum(part**2 / (n - 1) for part, n in zip(parts, counts, strict=True))
    freedom = sum(parts) ** 2 / squares if squares > 0 else math.inf
    return _around(middle, math.sqrt(sum(parts)), freedom, of, counts)


def paired(a: Sequence[float], b: Sequence[float], of: str = "rounds") -> Ratio:
    """Student's interval for the mean of the rounds' log ratios: what changed from round to round for both drops
    out."""
    logs = [math.log(second / first) for first, second in zip(a, b, strict=True)]
    counts = (len(logs), len(logs))
    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return Ratio(math.exp(middle), None, None, of, counts)
    return _around(middle, statistics.stdev(logs) / math.sqrt(len(logs)), len(logs) - 1, of, counts)


def _around(middle: float, error: float, freedom: float, of: str, counts: tuple[int, int]) -> Ratio:
    from scipy import stats  # where it is used: it takes longer to start than the rest of the command

    times = stats.norm.ppf((1 + CONFIDENCE) / 2) if math.isinf(freedom) else stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    reach = float(times) * error
    return Ratio(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach), of, counts)
