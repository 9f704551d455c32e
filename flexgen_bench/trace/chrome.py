"""A run in the Trace Event Format, which ui.perfetto.dev and chrome://tracing open.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU ("Trace Event Format").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flexgen_bench.core.tiers import Lane
from flexgen_bench.core.timeline import Slice
from flexgen_bench.trace.runs import TracedRun

PROCESS = 1  # one process, in which every lane is a thread


def trace_events(run: TracedRun) -> dict[str, Any]:
    """The document: one track per lane, one counter per link that was used. ts and dur are microseconds."""
    record = run.record
    return {
        "traceEvents": list(_events(run)),
        "displayTimeUnit": "ms",
        "otherData": {
            "run_id": record.run_id,
            "spec_hash": record.spec_hash,
            "evidence": record.evidence.value,
            "title": run.title,
            "dropped_steps": run.timeline.dropped,
        },
    }


def _events(run: TracedRun) -> Iterator[dict[str, Any]]:
    yield _metadata("process_name", 0, {"name": run.title})
    for thread, (lane, slices) in enumerate(run.timeline.lanes.items(), start=1):
        yield _metadata("thread_name", thread, {"name": lane})
        yield _metadata("thread_sort_index", thread, {"sort_index": thread})
        for slice_ in slices:
            yield _slice(run, slice_, lane, thread)
        if Lane.parse(lane).is_link:
            yield from _in_flight(lane, list(slices))


def _metadata(name: str, thread: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": PROCESS, "tid": thread, "args": arguments}


def _slice(run: TracedRun, slice_: Slice, lane: str, thread: int) -> dict[str, Any]:
    begin, end = _us(slice_.begin_s), _us(slice_.end_s)
    arguments: dict[str, Any] = {"unit": run.unit_name(slice_.unit), "bytes": slice_.bytes}
    if slice_.micro_batch_index >= 0:
        arguments |= {"micro_batch": slice_.micro_batch_index, "token": slice_.token}
    if slice_.part >= 0:
        arguments["part"] = slice_.part
    if slice_.flops:
        arguments["flops"] = slice_.flops
    for name, amount in (("gb_per_s", slice_.bytes), ("gflop_per_s", slice_.flops)):
        if amount and end > begin:
            arguments[name] = round(amount / ((end - begin) * 1e3), 3)
    return {
        "name": run.slice_name(slice_),
        "cat": f"{lane},{slice_.kind}",
        "ph": "X",
        "ts": begin,
        "dur": end - begin,
        "pid": PROCESS,
        "tid": thread,
        "args": arguments,
    }


def _in_flight(lane: str, slices: list[Slice]) -> Iterator[dict[str, Any]]:
    """The bytes of the transfer that is under way: a lane moves one at a time."""
    changes: dict[int, int] = {}
    for slice_ in slices:
        changes[_us(slice_.begin_s)] = slice_.bytes
        changes[_us(slice_.end_s)] = 0
    for time, count in sorted(changes.items()):
        yield {"name": f"{lane} in flight", "ph": "C", "ts": time, "pid": PROCESS, "args": {"bytes": count}}


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
