"""Numbers of accuracy in words: points, intervals, verdicts."""

from __future__ import annotations

import math

from flexgen_bench.accuracy.compare.compare import ModeComparison, TaskComparison, Verdict
from flexgen_bench.accuracy.compare.outcome import ModelOutcome, ModeOutcome
from flexgen_bench.accuracy.compare.statistics import Interval
from flexgen_bench.core.digits import NOISE_FREE, fixed, settled, significant

NOTHING = "-"
# Items that cannot be scored and are named on a page; the records name all.
_TOLD = 5

READING = """\
- **exact** is the uncompressed model in the dtype of the heading, on the same items. Everything is paired: the same \
item under both.
- **Change** is the mode's score minus the exact one, in points (hundredths) where scores lie between 0 and 1, with \
its 95 % interval (percentile bootstrap \
over items, 4,000 resamples with a fixed seed; whole subjects are drawn where items have one). **lost / won**: items \
that only the exact model, or only the mode, got right.
- **p** is McNemar's exact test (the bootstrap's where an item is not just right or wrong), adjusted by Holm for all \
tasks of the mode: below 0.05 chance does not explain the change.
- **Added bits per byte** is the added log-loss of the right text, per byte of that text: far more sensitive than \
accuracy.
- **equivalent**: the 90 % interval (two one-sided tests at 5 %) lies inside the margin; for right-or-wrong items it \
is the wider of the bootstrap's and Tango's score interval, \
so that equal answers on few items prove nothing. Perplexities are judged by added bits per byte. **worse**, \
**better**: not shown to lie inside the margin, and chance does not explain the change. \
**undecided**: too few items to say either; it does not mean that nothing was lost.
- All values are MEASURED: computed by the system named, on the items named."""


def points(value: float) -> str:
    """A change of a score between 0 and 1: ``-1.4``."""
    return fixed(100 * value, 1, plus=True) if math.isfinite(value) else NOTHING


def points_interval(interval: Interval | None) -> str:
    """``-1.4 (-3.0 to +0.2)``."""
    if interval is None:
        return NOTHING
    return f"{points(interval.value)} ({points(interval.low)} to {points(interval.high)})"


def bits_interval(interval: Interval | None) -> str:
    """``+0.012 (+0.010 to +0.014)``."""
    if interval is None:
        return NOTHING
    value, low, high = (fixed(v, 4, plus=True) for v in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})"


def score_text(task: TaskComparison, value: float) -> str:
    """A score between 0 and 1 in hundredths, others as they are."""
    if not math.isfinite(value):
        return NOTHING
    return fixed(100 * value, 1) if task.bounded else significant(value, 4)


def change_text(task: TaskComparison) -> str:
    """In the unit of the score."""
    if task.bounded:
        return points_interval(task.change)
    value, low, high = (
        significant(settled(v, 9), 3, plus=True) for v in (task.change.value, task.change.low, task.change.high)
    )
    return f"{value} ({low} to {high})"


def p_text(value: float) -> str:
    """``0.031``, ``<0.001``."""
    return "<0.001" if settled(value) < 0.001 else fixed(value, 3)


def bytes_text(value: float | None) -> str:
    return NOTHING if value is None else fixed(value, 2)


def verdict_text(mode: ModeOutcome) -> str:
    """The verdict on a mode, with what it must not be taken for."""
    comparison = mode.comparison
    if comparison is None or not comparison.tasks:
        return NOTHING
    if mode.on_grid:
        return f"{comparison.verdict} (weights lie on this grid: says nothing about other models)"
    worse = comparison.having(Verdict.WORSE)
    return f"{comparison.verdict}; worse on {', '.join(worse)}" if worse else str(comparison.verdict)


def worst_text(comparison: ModeComparison | None) -> str:
    """The task that lost most."""
    worst = None if comparison is None else comparison.worst
    return NOTHING if worst is None else f"{worst.task} {points(worst.change.value)}"


def advice(outcome: ModelOutcome) -> str:
    """What to do, in a sentence."""
    chosen = outcome.recommendation
    if chosen.mode is None:
        return f"No compressed setting is recommended: {chosen.why}."
    return f"Recommended: {chosen.mode}, {chosen.why}."


def ratio_to_yardstick(mode: ModeOutcome) -> float | None:
    """Mean added log-loss of the mode, of that of plain rounding on the same weights, over the tasks that both have."""
    if mode.comparison is None or mode.rtn is None:
        return None
    plain = {t.task: t.bits for t in mode.rtn.tasks}
    pairs = [(t.bits, plain[t.task]) for t in mode.comparison.tasks if t.task in plain]
    both = [(a.value, b.value) for a, b in pairs if a is not None and b is not None]
    ours, theirs = (math.fsum(pair[i] for pair in both) for i in (0, 1))
    return ours / theirs if settled(theirs, NOISE_FREE) else None


def left_out_lines(outcome: ModelOutcome) -> list[str]:
    """For each task with items that cannot be scored: how many, of which, and why. They are in no number, under no
    mode."""
    lines = []
    for name, record in outcome.exact.items():
        left_out = dict(record.left_out)
        for mode in outcome.modes:
            left_out |= mode.tasks[name].left_out if name in mode.tasks else {}
        if left_out:
            count = len(left_out)
            of = len(left_out.keys() | {item.id for item in record.items})
            reasons = "; ".join(f"item {item}: {why}" for item, why in list(left_out.items())[:_TOLD])
            more = f"; and {count - _TOLD} more" if count > _TOLD else ""
            lines.append(
                f"{name}: {count} of {of} items cannot be scored and are left out under every mode ({reasons}{more})"
            )
    return lines


def share_text(part: int, whole: int) -> str:
    """``97.5%``."""
    return f"{fixed(100 * part / whole, 1)}%"


def error_text(value: float | None) -> str:
    """A relative error: ``0.0841``."""
    return NOTHING if value is None else fixed(value, 4)
