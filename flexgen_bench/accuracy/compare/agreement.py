"""Two systems without compression on the same items: the same predictions, but for ties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_bench.core.accuracy import LOGLIK_DECIMALS, Item, TaskRecord
from flexgen_bench.core.digits import settled

# Two choices this close (natural logarithm) may change places by rounding alone.
TIE = 1e-3


@dataclass(frozen=True)
class Agreement:
    """ties: items whose predictions differ where the choices are closer than ``TIE``. different: ids of those that
    differ otherwise. mean, largest: of the differences of log-likelihoods. reference: the second system."""

    task: str
    reference: str
    n: int
    ties: int
    different: Sequence[str]
    mean: float
    largest: float


def agreement(first: TaskRecord, second: TaskRecord) -> Agreement:
    """One task of both, on the items they have in common."""
    others = {item.id: item for item in second.items}
    pairs = [(item, others[item.id]) for item in first.items if item.id in others]
    changes = [
        settled(b - a, LOGLIK_DECIMALS)
        for x, y in pairs
        for a, b in zip(x.loglik, y.loglik, strict=True)
        if math.isfinite(a) and math.isfinite(b)
    ]
    differing = [(x, y) for x, y in pairs if x.prediction != y.prediction]
    ties = [x.id for x, y in differing if _is_tie(x, y)]
    return Agreement(
        first.task,
        second.subject.system,
        len(pairs),
        len(ties),
        [x.id for x, _ in differing if x.id not in set(ties)],
        math.fsum(changes) / len(changes) if changes else 0.0,
        max(map(abs, changes), default=0.0),
    )


def _is_tie(first: Item, second: Item) -> bool:
    """Whether the two predicted choices are as good as equal, per byte if the metric looks at it per byte."""
    try:
        a, b = int(first.prediction), int(second.prediction)
    except ValueError:
        return False  # texts: nothing says how close they were
    return any(
        settled(abs(x - y), 2 * LOGLIK_DECIMALS) < TIE
        for item in (first, second)
        for x, y in (
            (item.loglik[a], item.loglik[b]),
            (item.loglik[a] / _length(item, a), item.loglik[b] / _length(item, b)),
        )
    )


def _length(item: Item, index: int) -> int:
    return max(item.bytes[index], 1)
