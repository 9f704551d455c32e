"""Rows as columns: what the page's table filters, sorts and shows, small enough for ten thousand records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from flexgen_bench.core.metrics import Summary
from flexgen_bench.page.gather import PageRow
from flexgen_bench.page.policy_words import policy_of
from flexgen_bench.report.cells import heading, one_line
from flexgen_bench.store.schema import parse_utc

_DIGITS = 6  # of a figure that is timed: more than anybody reads, fewer than a file should hold
_SHORT = 160
EXACT = "exact"


def columns(rows: Sequence[PageRow]) -> dict[str, Any]:
    """Every column by name: text as ``{"values": [...], "at": [place of each row's]}``, numbers as ``{"numbers":
    [...]}`` with null for what is not known."""
    texts = {name: _text(values) for name, values in _texts(rows).items()}
    return texts | {name: {"numbers": [_number(v) for v in values]} for name, values in _numbers(rows).items()}


def _texts(rows: Sequence[PageRow]) -> dict[str, list[str]]:
    headings = {r.row.group: heading(r.row) for r in rows}
    return {
        "system": [r.row.system for r in rows],
        "compression": [r.row.lossy or EXACT for r in rows],
        "model": [r.row.model for r in rows],
        "weights": [r.row.weights for r in rows],
        "dtype": [r.row.dtype for r in rows],
        "workload": [r.row.workload for r in rows],
        "hardware": [r.row.hardware for r in rows],
        "machine": [r.row.machine or "not recorded" for r in rows],
        "evidence": [r.row.evidence.value for r in rows],
        "status": [r.row.status.value for r in rows],
        "suite": [r.row.stored.record.suite or "(none)" for r in rows],
        "folder": [r.folder for r in rows],
        "run": ["newest" if r.newest else "older" for r in rows],
        "group": [headings[r.row.group] for r in rows],
        "tier": [r.row.lowest_tier for r in rows],
        "policy": [policy_of(r.row.stored.record) for r in rows],
        "reason": [one_line(r.row.reason, _SHORT) for r in rows],
        "interval": ["" if r.row.generation is None else r.row.generation.interval.value for r in rows],
        "tokens": [str(r.row.same_tokens) for r in rows],
        "best": ["fastest" if r.row.best else "" for r in rows],
        "id": _unique([r.row.stored.record.run_id for r in rows]),
    }


def _numbers(rows: Sequence[PageRow]) -> dict[str, list[float | int | None]]:
    summaries = [r.row.generation for r in rows]
    return {
        "tok": [_value(s) for s in summaries],
        "low": [None if s is None else s.low for s in summaries],
        "high": [None if s is None else s.high for s in summaries],
        "n": [None if s is None else s.n for s in summaries],
        "predicted": [r.row.predicted for r in rows],
        "prefill": [_value(r.row.prefill) for r in rows],
        "decode": [_value(r.row.decode) for r in rows],
        "latency": [latency_s(r) for r in rows],
        "batch": [r.row.batch_size for r in rows],
        "prompts": [r.row.num_prompts for r in rows],
        "host": [r.row.memory.host_peak for r in rows],
        "host_limit": [r.row.memory.host_limit for r in rows],
        "gpu": [r.row.memory.gpu_peak for r in rows],
        "ended": [int(parse_utc(r.row.stored.record.ended_utc, "ended_utc").timestamp()) for r in rows],
    }


def latency_s(of: PageRow) -> float | None:
    """Seconds from the start of a batch to its last token, mean over batches and repetitions."""
    row = of.row
    samples = row.stored.record.samples
    if row.generation is None or not row.batch_size or not row.num_prompts:
        return None
    batches = -(-row.num_prompts // row.batch_size)
    return sum(s.total_s for s in samples) / (batches * len(samples))


def last_ended(rows: Iterable[PageRow]) -> str:
    """When the last of these runs ended, in ISO 8601; "" for none. A page of the same records is the same page."""
    times = [parse_utc(r.row.stored.record.ended_utc, "ended_utc").astimezone(UTC) for r in rows]
    return max(times, default=datetime.min.replace(tzinfo=UTC)).isoformat(timespec="seconds") if times else ""


def _unique(names: Sequence[str]) -> list[str]:
    """A name for each row that only it has: a record may lie in several folders."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}~{seen[name]}")
    return found


def _value(summary: Summary | None) -> float | None:
    return None if summary is None else summary.value


def _text(values: Sequence[str]) -> dict[str, Any]:
    places = {value: place for place, value in enumerate(sorted(set(values)))}
    return {"values": list(places), "at": [places[value] for value in values]}


def _number(value: float | int | None) -> float | int | None:
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f"{value:.{_DIGITS}g}")
    return value
