"""Cells whose memory was asked for as a share of the weights, as ladders: one point per system and share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.model import DType
from flexgen_bench.core.simulated import Simulated
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.core.tiers import Tier
from flexgen_bench.report.devices import devices_of
from flexgen_bench.report.rows import Row
from flexgen_bench.report.same_tokens import lossy_of

# This project's engine: the system that others are held against.
OURS = "flexgen"


@dataclass(frozen=True)
class Figure:
    """Generated tokens/s. low, high: of the repetitions, where there are several; n: their number, 0 of a
    prediction."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0


@dataclass(frozen=True)
class Point:
    """One system on one rung.

    share: of the weights, uncompressed, in the cell's dtype; cap_bytes: the same in bytes. bits: of the weights as it
    computes with them. figure: None where it has none, ``status`` then says how it ended and ``reason`` why. enforced:
    whether the cap held; a prediction's always does. base_bytes: its process before anything of the model is loaded.
    """

    share: float
    cap_bytes: int
    system: str
    label: str
    bits: int
    status: Status
    reason: str
    evidence: Evidence
    figure: Figure | None = None
    batch_size: int | None = None
    enforced: bool = True
    base_bytes: int | None = None

    @property
    def is_ours(self) -> bool:
        return self.system == OURS


@dataclass(frozen=True)
class Ladder:
    """Points that differ in system, compression and the share of one tier. heading: what they have in common. fixed:
    shares of the weights that another tier has on all of them."""

    heading: str
    tier: Tier
    fixed: Mapping[str, float]
    points: tuple[Point, ...]

    @property
    def shares(self) -> list[float]:
        return sorted({point.share for point in self.points})

    @property
    def widths(self) -> list[int]:
        """Bits of the weights, the widest first."""
        return sorted({point.bits for point in self.points}, reverse=True)

    @property
    def weight_bytes(self) -> int:
        """Of the model, uncompressed."""
        point = max(self.points, key=lambda one: one.share)
        return round(point.cap_bytes / point.share)

    def at(self, bits: int, share: float) -> list[Point]:
        return [point for point in self.points if (point.bits, point.share) == (bits, share)]


def measured_ladders(rows: Sequence[Row]) -> list[Ladder]:
    """Of rows of records, of every cell the newest however often it was repeated; those whose cap was asked for in
    bytes stand on no ladder."""
    pairs = []
    for row in _newest(rows):
        hardware = row.stored.record.spec.get("hardware")
        shares = hardware.get("weight_shares") if isinstance(hardware, Mapping) else None
        if isinstance(hardware, Mapping) and isinstance(shares, Mapping) and shares:
            known = {str(tier): float(share) for tier, share in shares.items()}
            pairs.append((known, int(hardware[_BYTES[_climbed(known)]]), _heading(row), row))
    return _ladders((shares, heading, _of_row(shares, cap, row)) for shares, cap, heading, row in pairs)


def _newest(rows: Sequence[Row]) -> list[Row]:
    newest: dict[str, Row] = {}
    for row in sorted(rows, key=lambda one: one.stored.age):
        spec = row.stored.record.spec
        asked = [spec.get(key) for key in ("system_options", "policy", "lossy", "max_latency_s")]
        newest[json.dumps([row.group, row.system, *asked], sort_keys=True, default=str)] = row
    return list(newest.values())


def predicted_ladders(rows: Sequence[Simulated]) -> list[Ladder]:
    """The same of predictions."""
    return _ladders(
        (row.hardware.weight_shares, _heading_of(row), _of_prediction(row))
        for row in rows
        if row.hardware.weight_shares and row.model.predictor is not None
    )


_BYTES = {Tier.GPU: "gpu_memory_bytes", Tier.CPU: "cpu_memory_bytes", Tier.DISK: "disk_bytes"}
_DEFAULT_DTYPE_BYTES = 2


def _climbed(shares: Mapping[str, float]) -> Tier:
    """The tier that a ladder goes up in: the lowest one whose share is stated, since what is above it stays."""
    return next(tier for tier in (Tier.DISK, Tier.CPU, Tier.GPU) if tier.value in shares)


def _ladders(points: Iterable[tuple[Mapping[str, float], str, Point]]) -> list[Ladder]:
    grouped: dict[tuple[str, Tier, tuple[tuple[str, float], ...]], list[Point]] = {}
    for shares, heading, point in points:
        tier = _climbed(shares)
        fixed = tuple(sorted((name, share) for name, share in shares.items() if name != tier.value))
        grouped.setdefault((heading, tier, fixed), []).append(point)
    return [Ladder(heading, tier, dict(fixed), tuple(of)) for (heading, tier, fixed), of in grouped.items()]


def _of_row(shares: Mapping[str, float], cap_bytes: int, row: Row) -> Point:
    record, summary = row.stored.record, row.generation
    figure = None
    if summary is not None and summary.n == 1:
        figure = Figure(summary.value, n=1)
    elif summary is not None:
        figure = Figure(summary.value, summary.low, summary.high, summary.n)
    process = record.environment.get("process")
    base = process.get("base_bytes") if isinstance(process, Mapping) else None
    gpu_cap = process.get("gpu_memory_cap") if isinstance(process, Mapping) else None
    tier = _climbed(shares)
    held = {
        Tier.CPU: row.memory.enforced,
        Tier.GPU: not isinstance(gpu_cap, Mapping) or gpu_cap.get("enforced") is True,
    }
    return Point(
        share=shares[tier.value],
        cap_bytes=cap_bytes,
        system=row.system,
        label=row.label,
        bits=_bits(lossy_of(record), row.dtype),
        status=row.status,
        reason=row.reason,
        evidence=row.evidence,
        figure=figure,
        batch_size=row.batch_size,
        enforced=held.get(tier, True),
        base_bytes=base if isinstance(base, int) else None,
    )


def _of_prediction(row: Simulated) -> Point:
    tier, hardware = _climbed(row.hardware.weight_shares), row.hardware
    cap, done = hardware.capacity_bytes(tier), row.prediction
    assert cap is not None, "a profile with a share states its bytes"
    return Point(
        share=hardware.weight_shares[tier.value],
        cap_bytes=cap,
        system=row.system,
        label=row.label,
        bits=_bits(row.job.lossy, row.job.dtype.value),
        status=row.status,
        reason=row.reason,
        evidence=Evidence.SIMULATED,
        figure=None if done is None else Figure(done.tok_per_s),
        batch_size=None if done is None else done.batch_size,
    )


def _bits(lossy: Lossy, dtype: str) -> int:
    """Of a weight: those that a system may compress it to are its class, whether or not it makes use of them."""
    if lossy.weights is not None:
        return lossy.weights.bits
    return 8 * (DType(dtype).bytes if dtype in list(DType) else _DEFAULT_DTYPE_BYTES)


def _heading(row: Row) -> str:
    weights = f" ({row.weights} weights)" if row.weights else ""
    threads = f", {row.threads} threads" if row.threads else ""
    return (
        f"{row.model}{weights}, {row.dtype}; {row.num_prompts} prompts of {row.prompt_tokens} tokens, {row.gen_len} "
        f"generated each; {row.hardware}{threads}; {row.machine or 'machine not recorded'}"
    )


def _heading_of(row: Simulated) -> str:
    job = row.job
    prompts = "as many prompts as a block holds" if job.num_prompts is None else f"{job.num_prompts} prompts"
    return (
        f"{job.shape.name}, {job.dtype.value}; {prompts} of {job.prompt_len} tokens, {job.gen_len} generated each; "
        f"{devices_of(job.hardware)}"
    )
