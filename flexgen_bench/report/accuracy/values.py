"""Accuracy as CSV, unrounded: one row a task under a mode, and one row a tensor."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping

from flexgen_bench.accuracy.outcome import ModelOutcome


def tasks_csv(outcomes: Iterable[ModelOutcome]) -> str:
    """Every task under every mode."""
    return _csv(row for outcome in outcomes for row in _tasks(outcome))


def layers_csv(outcomes: Iterable[ModelOutcome]) -> str:
    """Every tensor's error under every mode."""
    return _csv(row for outcome in outcomes for row in _layers(outcome))


def _tasks(outcome: ModelOutcome) -> Iterator[dict[str, object]]:
    for mode in outcome.modes:
        for t in mode.comparison.tasks if mode.comparison else ():
            yield {
                "model": outcome.model, "system": outcome.system, "dtype": outcome.dtype, "mode": mode.mode, "lossy": str(mode.lossy),
                "bytes_per_weight": mode.bytes_per_weight, "task": t.task, "metric": t.metric, "n": t.n,
                "exact": t.reference, "score": t.score, "change": t.change.value, "change_low": t.change.low,
                "change_high": t.change.high, "lost": t.lost, "won": t.won, "p": t.p, "p_holm": t.p_holm,
                "added_bits_per_byte": t.bits and t.bits.value, "added_bits_per_byte_low": t.bits and t.bits.low,
                "added_bits_per_byte_high": t.bits and t.bits.high, "exact_bits_per_byte": t.bits_reference,
                "same_predictions": t.same_predictions, "truncated": t.truncated, "margin": outcome.margins.score if t.bounded
                else outcome.margins.bits, "sure_low": t.sure.low, "sure_high": t.sure.high, "verdict": t.verdict.value,
                "weights_on_grid": mode.on_grid, "evidence": mode.tasks[t.task].evidence.value,
            }  # fmt: skip


def _layers(outcome: ModelOutcome) -> Iterator[dict[str, object]]:
    for mode in outcome.modes:
        for e in (*mode.numbers.weights, *mode.numbers.kv) if mode.numbers else ():
            yield {
                "model": outcome.model, "system": outcome.system, "dtype": outcome.dtype, "mode": mode.mode, "layer": e.layer,
                "tensor": e.tensor, "values": e.values, "relative_error": e.error,
            }  # fmt: skip


def _csv(rows: Iterable[Mapping[str, object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for number, row in enumerate(rows):
        if number == 0:
            writer.writerow(row)
        writer.writerow("" if _is_nothing(v) else v for v in row.values())
    return out.getvalue()


def _is_nothing(value: object) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))
