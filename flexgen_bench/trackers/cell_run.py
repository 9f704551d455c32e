"""A cell as a tracked run: what is known before it, and what its record says after it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flexgen_bench.core.codec import from_json
from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.machine_name import machine_of
from flexgen_bench.core.metrics import metrics, summaries
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.record import Record
from flexgen_bench.core.status import Status
from flexgen_bench.core.tiers import Lane
from flexgen_bench.core.units import format_bytes
from flexgen_bench.models import registry
from flexgen_bench.report.devices import devices
from flexgen_bench.report.rows import build_rows
from flexgen_bench.report.table import csv_values
from flexgen_bench.store.reader import StoredRecord
from flexgen_bench.store.schema import encode
from flexgen_bench.store.trace import read_trace
from flexgen_bench.store.writer import suite_folder
from flexgen_bench.trace.chart import chart
from flexgen_bench.trace.chrome import trace_events
from flexgen_bench.trace.runs import TracedRun
from flexgen_bench.trackers.base import TrackedFile, TrackedResult, TrackedRun, TrackedTable, Value
from flexgen_bench.trackers.identity import measured_before, tracked_id

# Of a tokens table: prompts, and ids (or characters of text) of each.
MOST_PROMPTS, MOST_IDS, MOST_CHARACTERS = 64, 512, 4000
# Longest trace that is sent in the form that ui.perfetto.dev opens; of a longer one the record's own file is sent.
MOST_STEPS = 200_000
_LONGEST_TAG = 64
# What has a place of its own in the run, or a table, is left out of its configuration.
_NOT_CONFIG = ("samples", "warmup_samples", "outputs", "spec", "environment", "prediction", "tuning")


def cell_run(
    spec: Mapping[str, Any],
    suite: str,
    prediction: Mapping[str, Any],
    environment: Mapping[str, Any],
    *,
    spec_hash: str,
    evidence: str,
    results_dir: Path,
    besides: str = "",
) -> TrackedRun:
    """A cell that begins. spec, prediction, environment: as in a record. besides: the run whose record is written
    already, of a cell that is told of only after its end."""
    number = measured_before(results_dir, suite, spec_hash, besides)
    named = _named(spec) | {"suite": suite_folder(suite), "machine": machine_of(environment), "evidence": evidence}
    lossy = "" if from_json(Lossy, spec.get("lossy") or {}, "lossy").is_exact else named["lossy"]
    limit = spec.get("hardware", {}).get("cpu_memory_bytes")
    parts = [
        named["system"] + (f" ({lossy})" if lossy else ""),
        *(named[key] for key in ("model", "workload", "hardware")),
        format_bytes(limit) if limit else "",
        spec_hash[:4],
        f"#{number + 1}" if number else "",
    ]
    tags = [evidence, named["system"], named["model"], named["hardware"], named["machine"], lossy]
    return TrackedRun(
        id=tracked_id(results_dir, "cell", suite_folder(suite), spec_hash, number),
        name=" ".join(filter(None, parts)),
        group=suite_folder(suite),
        kind="cell",
        tags=as_tags(tags),
        config=named
        | {"spec_hash": spec_hash, "spec": spec, "plan": prediction, "environment": environment, "measurement": number},
        tables={"plan": TrackedTable(("what", "value"), list(_flat(prediction)))} if prediction else {},
    )


def cell_result(stored: StoredRecord) -> TrackedResult:
    """A cell that has ended, from its record."""
    record = stored.record
    circumstances = encode(replace(record, outputs={}, samples=(), warmup_samples=()))
    tables = {"tokens": _tokens(record), "lanes": _lanes(record), "tuning": _tuning(record)}
    pictures, files = _traced(stored)
    return TrackedResult(
        ok=record.status is Status.OK,
        summary=cell_summary(stored),
        config={k: v for k, v in circumstances.items() if k not in _NOT_CONFIG} | {"plan": record.prediction},
        tags=as_tags([record.status.value]),
        rows=repetition_rows(record),
        tables={name: table for name, table in tables.items() if table.rows},
        pictures=pictures,
        files=(TrackedFile(stored.path.name, str(stored.path)), *files),
    )


def cell_summary(stored: StoredRecord) -> dict[str, Value]:
    """The row of the report's table under the names of its CSV, every metric with its spread, and what pictures are
    drawn of: ``block_latency_s``, ``memory_share_of_weights`` (host memory that was allowed / weights as a checkpoint
    has them) and ``measured_over_predicted``."""
    record = stored.record
    row = dict(csv_values(build_rows([stored])[0], stored.path.parent))
    summary: dict[str, Any] = {name: value for name, value in row.items() if name not in ("record", "fastest")}
    for name, one in summaries(record).items():
        summary |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
    if "total_s" in summary and record.batch_size and row["num_prompts"]:
        summary["block_latency_s"] = summary["total_s"] / math.ceil(int(str(row["num_prompts"])) / record.batch_size)
    weights, limit = _weight_bytes(record.spec), row["host_limit_bytes"]
    if weights and isinstance(limit, int):
        summary |= {"weight_bytes": weights, "memory_share_of_weights": limit / weights}
    if summary.get("predicted_tok_per_s") and summary.get("generation_tok_per_s"):
        summary["measured_over_predicted"] = summary["generation_tok_per_s"] / summary["predicted_tok_per_s"]
    report = record.report
    summary |= {f"peak/{tier}_bytes": count for tier, count in report.peak_bytes.items()}
    summary |= {f"planned/{tier}_bytes": count for tier, count in report.planned_bytes.items()}
    return {name: value for name, value in summary.items() if value is not None}


def repetition_rows(record: Record) -> list[dict[str, Value]]:
    """One row per repetition: its raw figures and every metric of it, so that the spread can be seen."""
    values = metrics(record)
    rows = []
    for index, sample in enumerate(record.samples):
        row: dict[str, Value] = {"repetition": index, **{f"sample/{k}": v for k, v in asdict(sample).items()}}
        rows.append(row | {f"metric/{name}": m.samples[index] for name, m in values.items()})
    return rows


def as_tags(texts: list[str]) -> list[str]:
    """Each once, none empty, of the length that is allowed."""
    return list(dict.fromkeys(text[:_LONGEST_TAG] for text in texts if text))


def _named(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What cells are grouped and filtered by, at the top of the configuration."""
    model, workload, hardware = (spec.get(part) or {} for part in ("model", "workload", "hardware"))
    return {
        "system": str(spec.get("system", "")),
        "model": str((model.get("shape") or {}).get("name", "")),
        "weights": model.get("weights"),
        "dtype": spec.get("dtype"),
        "lossy": str(from_json(Lossy, spec.get("lossy") or {}, "lossy")),
        "workload": str(workload.get("name", "")),
        "num_prompts": workload.get("num_prompts"),
        "prompt_len": workload.get("prompt_len"),
        "gen_len": workload.get("gen_len"),
        "hardware": devices(hardware),
        "threads": spec.get("threads"),
    }


def _weight_bytes(spec: Mapping[str, Any]) -> int:
    shape = from_json(ModelShape, spec["model"]["shape"], "model.shape")
    return registry.weight_bytes(shape, DType(spec["dtype"]))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of nested mappings, by dotted names."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, default=str)


def _tokens(record: Record) -> TrackedTable:
    """Prompts and answers: text where the workload is text, else ids; bounded."""
    outputs = record.outputs
    answers = outputs.get("token_ids") or []
    lengths, prompts, texts = (outputs.get(key) or [] for key in ("prompt_lengths", "prompts", "texts"))
    rows: list[list[Value | None]] = [
        [
            number,
            lengths[number] if number < len(lengths) else None,
            prompts[number][-MOST_CHARACTERS:] if number < len(prompts) else None,
            len(ids),
            " ".join(map(str, ids[:MOST_IDS])),
            texts[number][:MOST_CHARACTERS] if number < len(texts) else None,
        ]
        for number, ids in enumerate(answers[:MOST_PROMPTS])
    ]
    return TrackedTable(("prompt", "prompt_tokens", "prompt_text", "new_tokens", "new_ids", "new_text"), rows)


def _lanes(record: Record) -> TrackedTable:
    """What each lane did since ``load``, warm-up included."""
    report = record.report
    total_s = sum(s.total_s for s in (*record.warmup_samples, *record.samples))
    rows: list[list[Value | None]] = []
    for lane, busy_s in report.lane_busy_s.items():
        use = report.links.get(lane)
        count = None if use is None else use.bytes
        rate = None if use is None or not use.seconds else use.bytes / use.seconds
        ends = "" if use is None else " to ".join(Lane.parse(lane).ends)
        rows.append([lane, ends, busy_s, busy_s / total_s if total_s else None, count, rate])
    return TrackedTable(("lane", "link", "busy_s", "busy_share", "bytes", "bytes_per_s"), rows)


def _tuning(record: Record) -> TrackedTable:
    rows = [[probe.batch_size, probe.tok_per_s, probe.reason] for probe in record.tuning]
    return TrackedTable(("batch_size", "projected_tok_per_s", "why_not"), rows)


def _traced(stored: StoredRecord) -> tuple[dict[str, str], list[TrackedFile]]:
    """The picture of the lanes, and the trace: its own file, and one that ui.perfetto.dev opens."""
    if not stored.record.trace:
        return {}, []
    path = stored.path.parent / stored.record.trace
    run = TracedRun(stored.path, stored.record, read_trace(path).timeline)
    picture = chart(run)
    files = [TrackedFile("trace.json.gz", str(path)), TrackedFile("lanes.svg", text=picture)]
    if sum(len(lane) for lane in run.timeline.lanes.values()) <= MOST_STEPS:
        events = json.dumps(trace_events(run), separators=(",", ":"), allow_nan=False)
        files.append(TrackedFile("perfetto.trace.json", text=events))
    return {"lanes_picture": picture}, files
