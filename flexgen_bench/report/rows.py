"""The rows of a table as plain values, computed from records and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flexgen_bench.core.codec import as_mapping
from flexgen_bench.core.digits import settled
from flexgen_bench.core.machine_name import machine_of
from flexgen_bench.core.metrics import DECODE, GENERATION, PREFILL, Summary, bytes_per_s, summarise
from flexgen_bench.core.record import Record
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.report.devices import devices
from flexgen_bench.report.same_tokens import Agreement, compare_group, lossy_of
from flexgen_bench.store.reader import StoredRecord


@dataclass(frozen=True)
class Memory:
    """Peak and limit of one cell in bytes; None where nobody measured or limited it.

    host_peak: page cache included where a control group counted it, else the process's highest resident set,
    else the system's own word. host_anonymous: without file pages, what the kernel could not have dropped.
    enforced: whether the kernel would have stopped the system at ``host_limit``.
    """

    host_peak: int | None
    host_anonymous: int | None
    host_limit: int | None
    enforced: bool
    gpu_peak: int | None
    gpu_limit: int | None


@dataclass(frozen=True)
class DiskReads:
    """What one repetition fetched from disk, in bytes, and that over the repetition's whole time, in bytes/s.

    counted_by_kernel: the same count for every system; otherwise the system's own word.
    busy_bytes_per_s: rate while the link was busy, where the system tells.
    """

    bytes_per_repetition: float
    mean_bytes_per_s: float
    counted_by_kernel: bool
    busy_bytes_per_s: float | None


@dataclass(frozen=True)
class Row:
    """One cell of the benchmark. ``group``: only rows of equal group may be compared.

    Figures are None unless the cell ended OK: a failed or invalid run has a reason, not a speed.
    ``best``: highest generation throughput among the OK, MEASURED rows of its group that compute the model exactly.
    predicted: generation throughput that was predicted for the run, in tok/s (SIMULATED).
    lossy: what the run changed of the results ("4-bit weights"); "" for an exact one.
    """

    group: str
    machine: str
    stored: StoredRecord
    system: str
    model: str
    weights: str
    dtype: str
    workload: str
    prompt_tokens: str
    gen_len: int | None
    num_prompts: int | None
    threads: int | None
    hardware: str
    batch_size: int | None
    lowest_tier: str
    status: Status
    reason: str
    evidence: Evidence
    generation: Summary | None
    prefill: Summary | None
    decode: Summary | None
    memory: Memory
    disk: DiskReads | None
    same_tokens: Agreement
    predicted: float | None = None
    lossy: str = ""
    best: bool = False

    @property
    def label(self) -> str:
        """The system, and what makes its results differ: a lossy run is never shown as the system's plain one."""
        return f"{self.system} ({self.lossy})" if self.lossy else self.system


def build_rows(records: Sequence[StoredRecord]) -> list[Row]:
    """One row per record, no record left out: groups together, fastest first, failures last. What two machines measured
    makes two groups."""
    by_group: dict[str, list[StoredRecord]] = {}
    for stored in records:
        group = json.dumps([group_key(stored.record), machine_of(stored.record.environment)])
        by_group.setdefault(group, []).append(stored)
    rows: list[Row] = []
    for group, members in by_group.items():
        agreements = compare_group([s.record for s in members])
        rows += _mark_best([_row(group, s, a) for s, a in zip(members, agreements, strict=True)])
    return sorted(rows, key=_order)


def group_key(record: Record) -> str:
    """Equal for records that measure the same thing: model, dtype, prompts, lengths, machine caps, threads."""
    spec = record.spec
    parts = [spec.get(k) for k in ("model", "dtype", "workload", "threads")]
    # What is known about a machine's speed changes with every calibration, and changes no result; nor do the words in
    # which a cap was asked for.
    known = ("sources", "rates", "weight_shares")
    hardware = {k: v for k, v in as_mapping(spec.get("hardware")).items() if k not in known}
    return json.dumps([*parts, hardware], sort_keys=True)


def _row(group: str, stored: StoredRecord, agreement: Agreement) -> Row:
    record = stored.record
    spec = record.spec
    model, workload = as_mapping(spec.get("model")), as_mapping(spec.get("workload"))
    hardware = as_mapping(spec.get("hardware"))
    ok = record.status is Status.OK
    return Row(
        group=group,
        machine=machine_of(record.environment),
        stored=stored,
        system=str(spec.get("system", "")),
        model=str(as_mapping(model.get("shape")).get("name", "")),
        weights=str(model.get("weights", "")),
        dtype=str(spec.get("dtype", "")),
        workload=str(workload.get("name", "")),
        prompt_tokens=_prompt_tokens(workload),
        gen_len=_count(workload.get("gen_len")),
        num_prompts=_count(workload.get("num_prompts")),
        threads=_count(spec.get("threads")),
        hardware=devices(hardware),
        batch_size=record.batch_size,
        lowest_tier=record.report.lowest_tier,
        status=record.status,
        reason=record.reason,
        evidence=record.evidence,
        generation=summarise(record, GENERATION) if ok else None,
        prefill=summarise(record, PREFILL) if ok else None,
        decode=summarise(record, DECODE) if ok else None,
        memory=_memory(record, hardware),
        disk=_disk_reads(record),
        same_tokens=agreement,
        predicted=_rate(record.prediction.get("tok_per_s")),
        lossy="" if lossy_of(record).is_exact else str(lossy_of(record)),
    )


def _memory(record: Record, hardware: Mapping[str, Any]) -> Memory:
    cap, peaks = record.memory_cap, record.report.peak_bytes
    process = as_mapping(record.environment.get("process"))
    counted = (cap.get("peak_bytes"), process.get("peak_resident_bytes"), peaks.get(Tier.CPU.value))
    limit = _count(cap.get("requested_bytes"))
    return Memory(
        host_peak=next((c for c in map(_count, counted) if c is not None), None),
        host_anonymous=_count(cap.get("peak_anonymous_bytes")),
        host_limit=_count(hardware.get("cpu_memory_bytes")) if limit is None else limit,
        enforced=cap.get("enforced") is True,
        gpu_peak=peaks.get(Tier.GPU.value),
        gpu_limit=_count(hardware.get("gpu_memory_bytes")),
    )


def _disk_reads(record: Record) -> DiskReads | None:
    """None unless it is known for every repetition."""
    seconds = math.fsum(s.total_s for s in record.samples)
    if not seconds > 0:
        return None
    reported = record.report.links.get(Lane.DISK_READ.name)
    counted = kernel_read_bytes(record)
    if counted is None and reported is None:
        return None
    total = counted if counted is not None else reported.bytes if reported is not None else 0
    return DiskReads(
        bytes_per_repetition=total / len(record.samples),
        mean_bytes_per_s=total / seconds,
        counted_by_kernel=counted is not None,
        busy_bytes_per_s=None if reported is None else bytes_per_s(reported),
    )


def kernel_read_bytes(record: Record) -> int | None:
    """Bytes that the kernel fetched from storage for the cell's process, over all repetitions."""
    per_repetition = as_mapping(record.environment.get("process")).get("io_per_repetition")
    if not isinstance(per_repetition, list) or len(per_repetition) != len(record.samples):
        return None
    counts = [_count(as_mapping(io).get("storage_read_bytes")) for io in per_repetition]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _mark_best(rows: list[Row]) -> list[Row]:
    """Mark the fastest row, where "fastest" means something: OK, MEASURED, exact, more than one such row."""
    fair = [
        r
        for r in rows
        if r.status is Status.OK and r.evidence is Evidence.MEASURED and r.generation is not None and not r.lossy
    ]
    if len(fair) < 2:
        return rows
    best = max(fair, key=_speed)
    return [replace(r, best=r is best) for r in rows]


def _speed(row: Row) -> float:
    return settled(row.generation.value) if row.generation is not None else -1.0


def _order(row: Row) -> tuple[Any, ...]:
    return (
        *(row.model, row.dtype, row.workload, row.hardware, row.group),
        *(-_speed(row), row.label, row.stored.path.name),
    )


def _prompt_tokens(workload: Mapping[str, Any]) -> str:
    """``32``, or ``8-64`` for prompts of mixed length."""
    longest, shortest = workload.get("prompt_len"), workload.get("min_prompt_len")
    mixed = workload.get("kind") == "text" and shortest != longest
    return f"{shortest}-{longest}" if mixed else str(longest)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _rate(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and value > 0 else None
