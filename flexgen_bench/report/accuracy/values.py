"""Accuracy as CSV: one row a task under a mode, one row a tensor, and one row a mode. Figures have the digits that
``core.digits`` gives to their kind; the records have all of them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping

from flexgen_bench.accuracy.compare.compare import TaskComparison
from flexgen_bench.accuracy.compare.outcome import ModelOutcome
from flexgen_bench.core.digits import CHANCE, NOISE_FREE, SCORE, SINGLE, fixed, settled, significant
from flexgen_bench.report.accuracy.loss import loss_values


def tasks_csv(outcomes: Iterable[ModelOutcome]) -> str:
    """Every task under every mode."""
    return _csv(row for outcome in outcomes for row in _tasks(outcome))


def layers_csv(outcomes: Iterable[ModelOutcome]) -> str:
    """Every tensor's error under every mode."""
    return _csv(row for outcome in outcomes for row in _layers(outcome))


def loss_csv(outcomes: Iterable[ModelOutcome]) -> str:
    """Every mode's loss token by token."""
    return _csv(loss_values(outcomes))


def _tasks(outcome: ModelOutcome) -> Iterator[dict[str, object]]:
    for mode in outcome.modes:
        for t in mode.comparison.tasks if mode.comparison else ():
            yield {
                "model": outcome.model,
                "system": outcome.system,
                "dtype": outcome.dtype,
                "mode": mode.mode,
                "lossy": str(mode.lossy) if mode.subject.weight_format is None else mode.subject.what,
                "bytes_per_weight": _number(mode.bytes_per_weight, SINGLE),
                "task": t.task,
                "metric": t.metric,
                "n": t.n,
                "exact": _score(t, t.reference),
                "score": _score(t, t.score),
                "change": _score(t, t.change.value),
                "change_low": _score(t, t.change.low),
                "change_high": _score(t, t.change.high),
                "lost": t.lost,
                "won": t.won,
                "p": _number(t.p, CHANCE),
                "p_holm": _number(t.p_holm, CHANCE),
                "added_bits_per_byte": _bits(t.bits.value if t.bits else None),
                "added_bits_per_byte_low": _bits(t.bits.low if t.bits else None),
                "added_bits_per_byte_high": _bits(t.bits.high if t.bits else None),
                "exact_bits_per_byte": _bits(t.bits_reference),
                "same_predictions": t.same_predictions,
                "truncated": t.truncated,
                "left_out": t.left_out,
                "margin": _number(outcome.margins.score if t.bounded else outcome.margins.bits, SCORE),
                "sure_low": _bits(t.sure.low),
                "sure_high": _bits(t.sure.high),
                "verdict": t.verdict.value,
                "weights_on_grid": mode.on_grid,
                "evidence": mode.tasks[t.task].evidence.value,
            }


def _layers(outcome: ModelOutcome) -> Iterator[dict[str, object]]:
    for mode in outcome.modes:
        for e in (*mode.numbers.weights, *mode.numbers.kv) if mode.numbers else ():
            yield {
                "model": outcome.model,
                "system": outcome.system,
                "dtype": outcome.dtype,
                "mode": mode.mode,
                "layer": e.layer,
                "tensor": e.tensor,
                "values": e.values,
                "relative_error": _number(e.error, SINGLE),
            }


def _score(task: TaskComparison, value: float) -> str:
    """A score, or a difference of scores: between 0 and 1 in decimals, a perplexity in digits."""
    if task.bounded:
        return _bits(value)
    return _number(settled(value, NOISE_FREE - SCORE), SCORE)


def _bits(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else fixed(value, SCORE)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None or not math.isfinite(value) else significant(value, digits)


def _csv(rows: Iterable[Mapping[str, object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for number, row in enumerate(rows):
        if number == 0:
            writer.writerow(row)
        writer.writerow("" if value is None else value for value in row.values())
    return out.getvalue()
