"""A stored record as a ``Run``."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from flexgen_bench.core.codec import from_json
from flexgen_bench.core.machine_name import machine_of
from flexgen_bench.core.metrics import DEFINITIONS, GENERATION, Summary, summarise
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.record import Record
from flexgen_bench.core.status import Status
from flexgen_bench.core.units import GB
from flexgen_bench.core.workload import PromptKind
from flexgen_bench.models import registry
from flexgen_bench.pictures.picture import Source
from flexgen_bench.pictures.run import Quantity, Run, Setting
from flexgen_bench.report.devices import devices
from flexgen_bench.report.same_tokens import lossy_of
from flexgen_bench.store.reader import StoredRecord

_PRICE = "rates.price_per_hour"


def run_of_record(stored: StoredRecord, results_dir: Path, prices: Mapping[str, float]) -> Run:
    """prices: USD per hour by the name of the hardware (``4 x t4`` of several devices), before what the record states.

    Raises KeyError, TypeError, ValueError or UserError for a record whose spec is not one of this project's.
    """
    record = stored.record
    hardware = record.spec["hardware"]
    name = devices(hardware)
    rates = hardware.get("rates") or {}
    ok = record.status is Status.OK
    lossy = lossy_of(record)
    workload = record.spec["workload"]
    return Run(
        source=Source(record.run_id, record.spec_hash, os.path.relpath(stored.path, results_dir)),
        system=str(record.spec["system"]),
        lossy="" if lossy.is_exact else str(lossy),
        evidence=record.evidence,
        status=record.status,
        reason=record.reason,
        setting=_setting(record),
        hardware=name,
        workload=str(workload["name"]),
        batch_size=record.batch_size,
        cpu_cap=_cap(hardware.get("cpu_memory_bytes")),
        gpu_cap=_cap(hardware.get("gpu_memory_bytes")),
        weight_bytes=weight_bytes(record.spec["model"]["shape"], record.spec["dtype"]),
        throughput=_quantity(record, GENERATION) if ok else None,
        predicted=_positive(record.prediction.get("tok_per_s")),
        price_per_hour=prices.get(name, _positive(rates.get("price_per_hour"))),
        price_source="given" if name in prices else str((hardware.get("sources") or {}).get(_PRICE, "")),
        rerun_command=record.rerun_command,
        **(_times(record) if ok else {}),
    )


def _cap(value: Any) -> int | None:
    """Raises TypeError for what is no number of bytes."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise TypeError(f"a memory cap of {value!r}")
    return value


@cache
def _weight_bytes(shape: str, dtype: str) -> int:
    known = from_json(ModelShape, json.loads(shape), "model.shape")
    return registry.weight_bytes(known, DType(dtype))


def weight_bytes(shape: Mapping[str, Any], dtype: str) -> int:
    """Of the uncompressed model in this dtype."""
    return _weight_bytes(json.dumps(shape, sort_keys=True), dtype)


def _setting(record: Record) -> Setting:
    spec = record.spec
    model, hardware = spec["model"], spec["hardware"]
    links = [f"{lane} {rate / GB:g} GB/s" for lane, rate in sorted((hardware.get("links") or {}).items())]
    return Setting(
        machine=machine_of(record.environment) or "a machine that its record does not name",
        hardware=", ".join([devices(hardware), *links]),
        model=str(model["shape"]["name"]),
        weights=str(model.get("weights", "")),
        dtype=str(spec["dtype"]),
        workload=_workload(spec["workload"]),
        threads=str(spec["threads"]),
        shape=hashlib.sha256(json.dumps([model, spec["workload"]], sort_keys=True).encode()).hexdigest()[:8],
    )


def _workload(workload: Mapping[str, Any]) -> str:
    longest, shortest = workload["prompt_len"], workload.get("min_prompt_len")
    mixed = workload.get("kind") == PromptKind.TEXT and shortest != longest
    lengths = f"{shortest} to {longest}" if mixed else str(longest)
    return (
        f"{workload['name']}: {workload['num_prompts']} prompts of {lengths} tokens, {workload['gen_len']} generated "
        "each"
    )


def _times(record: Record) -> dict[str, Any]:
    """Latencies, and seconds for each token, as ``core.metrics`` defines them: every repetition has as many tokens and
    batches, so each is a phase's seconds divided by a number."""
    sizes = {(s.prompt_tokens, s.generated_tokens, s.decode_tokens) for s in record.samples}
    if len(sizes) != 1:
        return {}
    ((prompt_tokens, generated, decoded),) = sizes
    sequences = generated - decoded
    batches = math.ceil(sequences / record.batch_size) if record.batch_size else 0
    prefill, decode = _quantity(record, "prefill_s"), _quantity(record, "decode_s")
    return {
        "block_s": _each(_quantity(record, "total_s"), batches),
        "first_token_s": _each(prefill, batches),
        "later_token_s": _each(decode, batches * decoded / sequences if sequences > 0 else 0),
        "input_s": _each(prefill, prompt_tokens),
        "output_s": _each(decode, generated),
    }


def _each(seconds: Quantity | None, count: float) -> Quantity | None:
    """None where there is nothing to divide, or it takes no time."""
    return seconds.times(1 / count) if seconds is not None and seconds.value > 0 and count > 0 else None


def _quantity(record: Record, metric: str) -> Quantity | None:
    assert metric in DEFINITIONS
    summary = summarise(record, metric)
    return None if summary is None else Quantity(summary.value, _range(summary))


def _range(summary: Summary) -> tuple[float, float] | None:
    return None if summary.n == 1 else (summary.low, summary.high)


def _positive(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 < value < math.inf else None
