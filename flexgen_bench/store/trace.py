"""Traces beside records: what every lane did in one repetition, as compact columns (docs/record.md)."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.record import Record
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.timeline import ROW, LaneTimeline, Timeline
from flexgen_bench.store.writer import record_path, write_new

TRACE_VERSION = 1
FOLDER, SUFFIX = "traces", ".json.gz"
_COLUMNS = ("kind", "unit", "batch", "part", "token", "gap_us", "duration_us", "bytes", "flops")
_ADVICE = "Delete it and measure the cell again."


@dataclass(frozen=True)
class Trace:
    """A timeline and the run it belongs to."""

    spec_hash: str
    evidence: Evidence
    timeline: Timeline


def encode_trace(trace: Trace) -> bytes:
    """The bytes of a trace file. The same trace gives the same bytes."""
    data = {
        "trace_version": TRACE_VERSION,
        "spec_hash": trace.spec_hash,
        "evidence": trace.evidence.value,
        "lanes": {name: _columns(lane) for name, lane in trace.timeline.lanes.items()},
    }
    return gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0)


def write_trace(record: Record, content: bytes, results_dir: Path) -> str:
    """Save what ``encode_trace`` made beside a record that is about to be written; what to put into its ``trace``.

    Raises StoreError if it cannot be saved.
    """
    path = record_path(record, results_dir)
    name = path.with_suffix(SUFFIX).name
    write_new(path.parent / FOLDER / name, content, "trace")
    return f"{FOLDER}/{name}"


def read_trace(path: Path) -> Trace:
    """The trace in a file. Raises StoreError naming the file, what is wrong with it and what to do."""
    try:
        data = json.loads(gzip.decompress(Path(path).read_bytes()))
    except FileNotFoundError as error:
        raise StoreError(f"there is no trace {path}. Measure the cell again to get one.") from error
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not a whole trace ({error}). {_ADVICE}") from error
    version = data.get("trace_version") if isinstance(data, dict) else None
    if version != TRACE_VERSION:
        raise StoreError(
            f"{path} has trace version {version!r}, this flexgen-bench knows {TRACE_VERSION}. "
            "Update flexgen-bench, or measure the cell again."
        )
    try:
        lanes = {name: _lane(columns) for name, columns in data["lanes"].items()}
        return Trace(data["spec_hash"], Evidence(data["evidence"]), Timeline(lanes))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise StoreError(f"{path} is not a usable trace ({error!r}). {_ADVICE}") from error


def _columns(lane: LaneTimeline) -> dict[str, Any]:
    """Gaps and durations instead of times: small numbers, which compress to a fraction."""
    columns: dict[str, Any] = {name: [] for name in _COLUMNS}
    places = {kind: place for place, kind in enumerate(lane.kinds)}
    end_us = 0
    for s in lane:
        begin_us = max(end_us, round(s.begin_s * 1e6))
        gap, end_before = begin_us - end_us, begin_us
        end_us = max(begin_us, round(s.end_s * 1e6))
        row = (places[s.kind], s.unit, s.micro_batch_index, s.part, s.token, gap, end_us - end_before, s.bytes, s.flops)
        for name, value in zip(_COLUMNS, row, strict=True):
            columns[name].append(value)
    return {"bytes_per_s": lane.bytes_per_s, "dropped": lane.dropped, "kinds": list(lane.kinds)} | columns


def _lane(columns: Mapping[str, Any]) -> LaneTimeline:
    packed, end_us = bytearray(), 0
    kinds = tuple(str(kind) for kind in columns["kinds"])
    for row in zip(*(columns[name] for name in _COLUMNS), strict=True):
        kind, unit, batch, part, token, gap, duration, count, flops = row
        if not 0 <= kind < len(kinds) or gap < 0 or duration < 0:
            raise ValueError(f"a step of kind {kind}, {gap} us after the last, {duration} us long")
        begin_us = end_us + gap
        end_us = begin_us + duration
        try:
            packed += ROW.pack(kind, unit, batch, part, token, begin_us / 1e6, end_us / 1e6, count, flops)
        except struct.error as error:
            raise ValueError(f"a step of {row}: {error}") from error
    return LaneTimeline(packed, kinds, 0.0, columns["bytes_per_s"], int(columns["dropped"]))
