"""Every metric of the project, computed from a record's raw samples in this one place.

Each metric is a ratio of two sums over the repetitions, so that a long repetition weighs as much as it lasted:
the headline is total tokens / total time, never a mean of rates.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from flexgen_bench.core.policy import Policy
from flexgen_bench.core.record import LinkUse, Metric, Record, Sample
from flexgen_bench.core.status import Evidence

# Below this many repetitions a bootstrap interval is a guess, so the plain range is reported instead.
BOOTSTRAP_LEAST_N = 5
BOOTSTRAP_RESAMPLES = 2000
BOOTSTRAP_CONFIDENCE = 0.95
_BOOTSTRAP_SEED = 20230313  # any constant: the same samples must always give the same interval

GENERATION = "generation_tok_per_s"
PREFILL = "prefill_tok_per_s"
DECODE = "decode_tok_per_s"
HEADLINE = GENERATION


class IntervalKind(StrEnum):
    """What ``low`` and ``high`` of a summary are."""

    BOOTSTRAP = "95% bootstrap"  # percentiles of the pooled value over resampled repetitions
    RANGE = "range"  # smallest and largest repetition
    SINGLE = "single run"  # one repetition: there is no spread to report


@dataclass(frozen=True)
class Definition:
    """How a metric is computed: sum of ``numerator`` / sum of ``denominator`` over repetitions.

    Both see one repetition and the number of batches its prompts were split into. of_a_phase: needs the time of prefill
    or decode alone.
    """

    unit: str
    higher_is_better: bool
    numerator: Callable[[Sample, int], float]
    denominator: Callable[[Sample, int], float]
    needs_batch_size: bool = False
    of_a_phase: bool = True


@dataclass(frozen=True)
class Summary:
    """One metric over all repetitions: the pooled value, its spread and what the spread is."""

    value: float
    low: float
    high: float
    n: int
    interval: IntervalKind
    unit: str
    higher_is_better: bool
    evidence: Evidence


def _sequences(sample: Sample) -> int:
    """Prompts of the workload: each has exactly one first token, which is not a decode token."""
    return sample.generated_tokens - sample.decode_tokens


def _later_steps(sample: Sample, batches: int) -> float:
    """Decode steps of all batches: each step gives one later token to every prompt of its batch."""
    sequences = _sequences(sample)
    return batches * sample.decode_tokens / sequences if sequences > 0 else 0.0


DEFINITIONS: dict[str, Definition] = {
    # Generated tokens / (prefill time + decode time): the throughput of the FlexGen paper (section 6).
    GENERATION: Definition(
        "tok/s", True, lambda s, _: s.generated_tokens, lambda s, _: s.prefill_s + s.decode_s, of_a_phase=False
    ),
    PREFILL: Definition("tok/s", True, lambda s, _: s.prompt_tokens, lambda s, _: s.prefill_s),
    DECODE: Definition("tok/s", True, lambda s, _: s.decode_tokens, lambda s, _: s.decode_s),
    "total_s": Definition("s", False, lambda s, _: s.prefill_s + s.decode_s, lambda *_: 1, of_a_phase=False),
    "prefill_s": Definition("s", False, lambda s, _: s.prefill_s, lambda *_: 1),
    "decode_s": Definition("s", False, lambda s, _: s.decode_s, lambda *_: 1),
    # Time from the start of a batch until each of its prompts has its first token, mean over batches.
    "first_token_s": Definition("s", False, lambda s, _: s.prefill_s, lambda _, b: b, True),
    # Mean gap between two tokens of the same prompt.
    "time_per_later_token_s": Definition("s", False, lambda s, _: s.decode_s, _later_steps, True),
}


def phases_overlap(record: Record) -> bool:
    """Whether a policy of ours ran that computes some prompts while others decode; other systems' settings are no such
    policy."""
    policy = Policy.stated_in(record.report.requested)
    return policy is not None and policy.mixes_phases(max(map(_sequences, record.samples), default=0))


def _parts(record: Record, name: str) -> list[tuple[float, float]] | None:
    """Numerator and denominator of every repetition, or None where the metric is not defined.

    Not defined: no samples, a repetition whose denominator is zero (decode throughput of a one-token
    generation), an unknown batch size where the metric needs one, or phases that overlap where it needs one of them.
    """
    definition = DEFINITIONS[name]
    if definition.of_a_phase and phases_overlap(record):
        return None
    if not record.samples or (definition.needs_batch_size and not record.batch_size):
        return None
    parts = []
    for sample in record.samples:
        batches = math.ceil(_sequences(sample) / record.batch_size) if record.batch_size else 0
        top = float(definition.numerator(sample, batches))
        bottom = float(definition.denominator(sample, batches))
        if not (bottom > 0 and math.isfinite(bottom) and math.isfinite(top)):
            return None
        parts.append((top, bottom))
    return parts


def metrics(record: Record) -> dict[str, Metric]:
    """Every metric that the record's samples define, one value per repetition, in a fixed order."""
    known = {}
    for name, definition in DEFINITIONS.items():
        parts = _parts(record, name)
        if parts is not None:
            known[name] = Metric(
                unit=definition.unit,
                higher_is_better=definition.higher_is_better,
                evidence=record.evidence,
                samples=tuple(top / bottom for top, bottom in parts),
            )
    return known


def summarise(record: Record, name: str = HEADLINE) -> Summary | None:
    """The pooled value of one metric with its spread; None where the samples do not define it.

    Raises KeyError for a name that is not in ``DEFINITIONS``.
    """
    parts = _parts(record, name)
    if parts is None:
        return None
    low, high, kind = _interval(parts)
    definition = DEFINITIONS[name]
    return Summary(
        value=_pooled(parts),
        low=low,
        high=high,
        n=len(parts),
        interval=kind,
        unit=definition.unit,
        higher_is_better=definition.higher_is_better,
        evidence=record.evidence,
    )


def summaries(record: Record) -> dict[str, Summary]:
    """``summarise`` for every metric that the record's samples define."""
    all_summaries = ((name, summarise(record, name)) for name in DEFINITIONS)
    return {name: summary for name, summary in all_summaries if summary is not None}


def bytes_per_s(use: LinkUse) -> float | None:
    """Rate of a link while it was busy, in bytes/s; None where its busy time is not known."""
    return use.bytes / use.seconds if use.seconds > 0 else None


def _pooled(parts: Sequence[tuple[float, float]]) -> float:
    return math.fsum(top for top, _ in parts) / math.fsum(bottom for _, bottom in parts)


@cache
def _draws(repetitions: int) -> Mapping[tuple[int, ...], int]:
    """Which repetitions resamples take, and how many resamples take these: the same for every record of so many. Whole
    repetitions are drawn, not steps: the steps of one generation are not independent."""
    source = random.Random(_BOOTSTRAP_SEED)
    drawn = (source.choices(range(repetitions), k=repetitions) for _ in range(BOOTSTRAP_RESAMPLES))
    return Counter(tuple(sorted(indices)) for indices in drawn)


def _interval(parts: Sequence[tuple[float, float]]) -> tuple[float, float, IntervalKind]:
    rates = [top / bottom for top, bottom in parts]
    if len(parts) < BOOTSTRAP_LEAST_N:
        kind = IntervalKind.SINGLE if len(parts) == 1 else IntervalKind.RANGE
        return min(rates), max(rates), kind
    # Sums are exact (fsum), so what is drawn in another order has the same value and is computed once.
    tops, bottoms = (tuple(column) for column in zip(*parts, strict=True))
    values = sorted(
        (math.fsum(map(tops.__getitem__, draw)) / math.fsum(map(bottoms.__getitem__, draw)), count)
        for draw, count in _draws(len(parts)).items()
    )
    pooled = [value for value, count in values for _ in range(count)]
    tail = (1 - BOOTSTRAP_CONFIDENCE) / 2
    cuts = statistics.quantiles(pooled, n=round(1 / tail), method="inclusive")
    return cuts[0], cuts[-1], IntervalKind.BOOTSTRAP
