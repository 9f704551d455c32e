"""Modes of an accuracy run as tracked runs, one for each mode, made from records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from flexgen_bench.accuracy.compare.compare import ModeComparison
from flexgen_bench.accuracy.compare.outcome import ModelOutcome
from flexgen_bench.accuracy.compare.statistics import Interval, score
from flexgen_bench.core.accuracy import EXACT_MODE, ModeRecord, Subject, TaskRecord
from flexgen_bench.core.machine_name import machine_of
from flexgen_bench.trackers.base import TrackedResult, TrackedRun, TrackedTable, Tracker, Value
from flexgen_bench.trackers.cell_run import as_tags
from flexgen_bench.trackers.identity import tracked_id

_COLUMNS = (
    "task",
    "metric",
    "items",
    "score",
    "exact_score",
    "change",
    "low",
    "high",
    "verdict",
    "seconds",
    "evidence",
)


def send_accuracy(tracker: Tracker, outcomes: Sequence[ModelOutcome], results_dir: Path) -> None:
    """Every mode of every model, the uncompressed one too. What was sent before is replaced: nothing is there twice."""
    for outcome in outcomes:
        for subject, tasks, numbers, comparison in _modes(outcome):
            tracker.begin(_run(outcome, subject, tasks, results_dir))
            tracker.end(_result(tasks, numbers, comparison))


def _modes(
    outcome: ModelOutcome,
) -> Iterator[tuple[Subject, Mapping[str, TaskRecord], ModeRecord | None, ModeComparison | None]]:
    yield next(iter(outcome.exact.values())).subject, outcome.exact, None, None
    for mode in outcome.modes:
        yield mode.subject, mode.tasks, mode.numbers, mode.comparison


def _run(outcome: ModelOutcome, subject: Subject, tasks: Mapping[str, TaskRecord], results_dir: Path) -> TrackedRun:
    newest = max(tasks.values(), key=lambda record: record.ended_utc)
    machine = machine_of(newest.environment)
    named = {
        "system": subject.system,
        "model": subject.model,
        "mode": subject.mode,
        "lossy": "exact" if subject.is_exact else subject.what,
        "dtype": subject.dtype,
        "role": subject.role.value,
        "machine": machine,
        "evidence": newest.evidence.value,
    }
    identity = (subject.model, subject.fingerprint, subject.run_dtype, subject.system, subject.mode)
    return TrackedRun(
        id=tracked_id(results_dir, "accuracy", *identity),
        name=f"{subject.system} {subject.model} {subject.mode} {subject.run_dtype}",
        group=f"accuracy {outcome.model}",
        kind="accuracy",
        tags=as_tags([newest.evidence.value, subject.system, subject.model, subject.mode, machine]),
        config=named | {"fingerprint": subject.fingerprint, "environment": newest.environment},
    )


def _result(
    tasks: Mapping[str, TaskRecord], numbers: ModeRecord | None, comparison: ModeComparison | None
) -> TrackedResult:
    compared = {} if comparison is None else {one.task: one for one in comparison.tasks}
    rows: list[list[Value]] = []
    history: list[dict[str, Value]] = []
    for number, (name, record) in enumerate(sorted(tasks.items())):
        value = score(np.array([item.parts for item in record.items]), record.statistic)
        one = compared.get(name)
        change = [None] * 5 if one is None else [one.reference, *_interval(one.change), one.verdict.value]
        rows.append([name, record.metric, len(record.items), value, *change, record.seconds, record.evidence.value])
        history.append({"task_number": number, "task": name, "task_score": value})
    summary: dict[str, Value] = {f"task/{row[0]}": row[3] for row in rows} | {"tasks": len(rows)}
    if comparison is None:
        summary |= {"verdict": EXACT_MODE, "score_change": 0.0}
    else:
        summary["verdict"] = comparison.verdict.value
        if comparison.score is not None:
            names = ("score_change", "score_change_low", "score_change_high")
            summary |= dict(zip(names, _interval(comparison.score), strict=True))
        if comparison.bits is not None:
            summary["bits_per_byte_change"] = comparison.bits.value
    if numbers is not None:
        if numbers.bytes_per_weight is not None:
            summary["bytes_per_weight"] = numbers.bytes_per_weight
        for one_text in numbers.divergence:
            summary |= {"kl_nats": one_text.kl, "same_top_token": one_text.agree / max(one_text.positions, 1)}
    table = TrackedTable(_COLUMNS, rows)
    return TrackedResult(ok=True, summary=summary, rows=history, tables={"accuracy": table})


def _interval(interval: Interval) -> list[float]:
    return [interval.value, interval.low, interval.high]
