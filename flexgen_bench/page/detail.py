"""One record in full, as the page shows a cell: what it asks and answers, and the settings that a comparison marks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.metrics import bytes_per_s, metrics, phases_overlap, summaries
from flexgen_bench.core.record import Record, SystemReport
from flexgen_bench.page.gather import PageRow
from flexgen_bench.page.policy_words import busy_shares, chosen_by, policy_of, why
from flexgen_bench.report.cells import one_line
from flexgen_bench.report.rows import Memory
from flexgen_bench.report.usable import ODD, error_text

# Measured constants of the machine: hundreds of figures that decide what is predicted, and no result.
_LONG = ("rates", "sources")
_TEXTS, _CHARACTERS = 3, 400
_LONGEST = 4000


def whole_or_problem(
    of: PageRow, accuracy: Sequence[Mapping[str, Any]], lanes_file: str, lanes: Mapping[str, Any] | None
) -> dict[str, Any]:
    """``detail``, or of a record that holds something odd its file and ``problem``: its row stands in the table."""
    try:
        found = detail(of, accuracy, lanes_file, lanes)
        json.dumps(found, allow_nan=False)
    except ODD as error:
        problem = f"is in the table, and cannot be shown in full ({error_text(error)}). Measure the cell again."
        return {"file": of.file, "run_id": of.row.stored.record.run_id, "problem": problem}
    return found


def detail(
    of: PageRow, accuracy: Sequence[Mapping[str, Any]], lanes_file: str, lanes: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the page knows of a cell beyond its row. accuracy: what its compression costs; lanes: of its trace, and
    the file that has them, or ""."""
    record, row = of.row.stored.record, of.row
    timed = _without_policy(record)
    values = metrics(timed)
    return {
        "file": of.file,
        "run_id": record.run_id,
        "spec_hash": record.spec_hash,
        "label": row.label,
        "status": record.status.value,
        "reason": record.reason[:_LONGEST],
        "started": record.started_utc,
        "ended": record.ended_utc,
        "rerun": record.rerun_command,
        "evidence": record.evidence.value,
        "policy": policy_of(record),
        "chosen_by": chosen_by(record),
        "why": why(record, lanes),
        "tokens": str(row.same_tokens),
        "metrics": [
            {"name": name, "value": s.value, "low": s.low, "high": s.high, "unit": s.unit, "interval": s.interval.value}
            | {"samples": list(values[name].samples)}
            for name, s in summaries(timed).items()
        ],
        "repetitions": len(record.samples),
        "warmups": len(record.warmup_samples),
        "batch_size": record.batch_size,
        "load_s": record.load_s,
        "tuning": to_json(tuple(record.tuning)),
        "requested": record.report.requested,
        "realised": _realised(record),
        "memory": _memory(record, row.memory),
        "purposes": _purposes(record),
        "links": [
            {"lane": lane, "bytes": use.bytes, "seconds": use.seconds, "rate": bytes_per_s(use)}
            for lane, use in record.report.links.items()
        ],
        "lanes": _lanes(record),
        "lanes_file": lanes_file,
        "prediction": {k: v for k, v in record.prediction.items() if k != "policy"},
        "predicted_policy": record.prediction.get("policy"),
        "accuracy": list(accuracy),
        "warnings": warnings(of),
        "outputs": _outputs(record),
        "settings": _without_long(record.spec),
        "environment": record.environment,
    }


def _without_policy(record: Record) -> Record:
    """The record as its metrics need it. Each of them reads the policy, to know whether phases overlap; here that is
    asked once: sixteen times a record takes as long as reading it."""
    return record if phases_overlap(record) else replace(record, report=SystemReport())


def warnings(of: PageRow) -> list[str]:
    """What a reader of the figure must know."""
    record, cap = of.row.stored.record, of.row.stored.record.memory_cap
    found = list(record.report.notes)
    for key in ("cap_note", "workload_note"):
        if record.validity.get(key):
            found.append(str(record.validity[key]))
    if cap.get("requested_bytes") is not None and cap.get("reason"):
        found.append(f"memory cap: {cap['reason']}")
    failed = [k for k, v in record.validity.items() if v is False and k != "memory_cap_enforced"]
    found += [f"check failed: {name.replace('_', ' ')}" for name in failed]
    code = record.environment.get("code")
    if isinstance(code, Mapping) and code.get("dirty"):
        found.append("measured with uncommitted changes of the code")
    if not of.newest:
        found.append("an older run: this cell has been measured again since")
    return found


def _realised(record: Record) -> dict[str, Any]:
    """What the allocator did, without the bytes, which stand with the memory."""
    return {k: v for k, v in record.report.realised.items() if k not in ("bytes", "allocated")}


def _memory(record: Record, memory: Memory) -> list[dict[str, Any]]:
    """A row per tier, bytes: planned, peak, the limit and whether the kernel kept it."""
    planned, peaks = record.report.planned_bytes, dict(record.report.peak_bytes)
    limits = {"cpu": memory.host_limit, "gpu": memory.gpu_limit}
    if memory.host_peak is not None:
        peaks["cpu"] = memory.host_peak
    tiers = sorted({*planned, *peaks, *(tier for tier, limit in limits.items() if limit is not None)})
    return [
        {
            "tier": tier,
            "planned": planned.get(tier),
            "peak": peaks.get(tier),
            "anonymous": memory.host_anonymous if tier == "cpu" else None,
            "limit": limits.get(tier),
            "enforced": memory.enforced if tier == "cpu" and memory.host_limit is not None else None,
        }
        for tier in tiers
    ]


def _purposes(record: Record) -> list[dict[str, Any]]:
    """Bytes by tier and purpose, as the system says it used them."""
    used = record.report.realised.get("bytes")
    if not isinstance(used, Mapping):
        return []
    return [
        {"tier": str(tier), "purpose": str(purpose), "bytes": count}
        for tier, of_tier in used.items()
        if isinstance(of_tier, Mapping)
        for purpose, count in of_tier.items()
        if isinstance(count, int)
    ]


def _lanes(record: Record) -> list[dict[str, Any]]:
    shares = busy_shares(record)
    return [
        {"lane": lane, "seconds": seconds, "share": shares.get(lane)}
        for lane, seconds in record.report.lane_busy_s.items()
    ]


def _outputs(record: Record) -> dict[str, Any]:
    """The first texts and the hash of all tokens; the tokens themselves stay in the record."""
    texts, prompts = record.outputs.get("texts"), record.outputs.get("prompts")
    shown = list(texts[:_TEXTS]) if isinstance(texts, list | tuple) else []
    asked = list(prompts[: len(shown)]) if isinstance(prompts, list | tuple) else []
    return {
        "sha256": record.outputs.get("sha256"),
        "texts": [one_line(str(text), _CHARACTERS) for text in shown],
        "prompts": [one_line(str(text), _CHARACTERS) for text in asked],
    }


def _without_long(spec: Mapping[str, Any]) -> dict[str, Any]:
    hardware = spec.get("hardware")
    if not isinstance(hardware, Mapping):
        return dict(spec)
    return {**spec, "hardware": {k: v for k, v in hardware.items() if k not in _LONG}}


def shared(details: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Details of one file with what several have in common written once: in ``settings`` and ``environment`` stand
    places of ``values``."""
    values: list[Any] = []
    places: dict[str, int] = {}

    def place(value: Any) -> int:
        key = repr(value)
        if key not in places:
            places[key] = len(values)
            values.append(value)
        return places[key]

    parts = ("settings", "environment")
    cells = [one | {p: {k: place(v) for k, v in one[p].items()} for p in parts if p in one} for one in details]
    return {"values": values, "cells": cells}
