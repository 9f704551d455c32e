"""Measuring until it is stable: rounds that go through everything, so that a busy neighbour disturbs every constant
alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

# Calls of one sample are as many as fill its time, within reason.
_MOST_CALLS = 10_000
# Below two samples there is no spread at all: these are taken whatever the budget.
_FEWEST_ROUNDS = 2
# Times a sample's length: of a call that is worth looking at although it is the first.
_LONG = 10


def _nothing() -> None:
    """What most probes have to do before or after their calls."""


@dataclass(frozen=True)
class Probe:
    """One constant and the work that shows it.

    amount: what a call does, in FLOP, bytes or steps. settle: waits for work that calls have only issued; it is part of
    the time. after: what a sample leaves behind is put right, outside the time.
    """

    name: str
    amount: float
    call: Callable[[], object]
    settle: Callable[[], object] = _nothing
    after: Callable[[], object] = _nothing


@dataclass(frozen=True)
class Reading:
    """What a probe has shown: ``rate`` in amounts per second, ``spread`` half the range of the last samples over their
    median. amount: of a call. slowdowns: of every sample, the first call's not among them, its time over that at
    ``rate``."""

    rate: float
    spread: float
    samples: int
    stable: bool
    amount: float = field(default=1.0, compare=False)
    slowdowns: tuple[float, ...] = field(default=(), compare=False)

    @property
    def seconds(self) -> float:
        """Of a call."""
        return self.amount / self.rate


@dataclass(frozen=True)
class Patience:
    """When to stop. A constant is stable once the last ``last`` samples of at least ``sample_s`` seconds each have a
    spread of at most ``spread``; after ``budget_s`` seconds (warming up included) the others stay as they are."""

    budget_s: float
    sample_s: float
    last: int
    spread: float


@dataclass(frozen=True)
class RoundProgress:
    """How far it is: rounds begun, constants that are finished, of how many, and the time used."""

    round: int
    finished: int
    total: int
    elapsed_s: float


def spread_of(rates: Sequence[float]) -> float:
    """Half the range over the median; 1 for a single value, of which nothing is known."""
    if len(rates) < 2:
        return 1.0
    return (max(rates) - min(rates)) / 2 / statistics.median(rates)


def measure(
    probes: Sequence[Probe],
    patience: Patience,
    on_round: Callable[[RoundProgress], None] = lambda progress: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Reading]:
    """All probes' readings by name. A first call of each warms up; then every round takes a sample of each that is not
    stable.

    A first call that is long is a sample itself: what happens once is little beside it. A stable constant is the median
    of its last samples, another one of all it has.
    """
    begin = clock()
    samples: dict[str, list[float]] = {probe.name: [] for probe in probes}
    assert len(samples) == len(probes), "names tell constants apart"
    calls: dict[str, int] = {}
    first: set[str] = set()  # those whose first call is a sample
    for probe in probes:
        seconds = _timed(probe, 1, clock)
        calls[probe.name] = _enough(seconds, patience)
        if seconds > _LONG * patience.sample_s:
            samples[probe.name].append(probe.amount / seconds)
            first.add(probe.name)
        on_round(RoundProgress(0, 0, len(probes), clock() - begin))
    waiting, number = list(probes), 0
    while waiting:
        number += 1
        for probe in waiting:
            if number > _FEWEST_ROUNDS and clock() - begin > patience.budget_s:
                return _readings(probes, samples, first, patience)
            seconds = _timed(probe, calls[probe.name], clock) / calls[probe.name]
            samples[probe.name].append(probe.amount / seconds)
            # The first call may have been slow for other reasons than its work.
            calls[probe.name] = _enough(seconds, patience)
            on_round(RoundProgress(number, len(probes) - len(waiting), len(probes), clock() - begin))
        waiting = [p for p in waiting if not _is_stable(samples[p.name], patience)]
    return _readings(probes, samples, first, patience)


def _timed(probe: Probe, calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        probe.call()
    probe.settle()
    seconds = clock() - start
    probe.after()
    return max(seconds, 1e-9)


def _enough(seconds: float, patience: Patience) -> int:
    """Calls that fill a sample."""
    return max(1, min(_MOST_CALLS, round(patience.sample_s / seconds)))


def _is_stable(rates: Sequence[float], patience: Patience) -> bool:
    return len(rates) >= patience.last and spread_of(rates[-patience.last :]) <= patience.spread


def _readings(
    probes: Sequence[Probe], samples: Mapping[str, Sequence[float]], first: Collection[str], patience: Patience
) -> dict[str, Reading]:
    readings = {}
    for probe in probes:
        rates = samples[probe.name]
        stable, last = _is_stable(rates, patience), rates[-patience.last :]
        median = statistics.median(last if stable else rates)
        slowdowns = tuple(median / rate for rate in rates[probe.name in first :])
        readings[probe.name] = Reading(median, spread_of(last), len(rates), stable, probe.amount, slowdowns)
    return readings
