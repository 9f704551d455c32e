"""The text of a table's cells: figures with their spread, evidence marks, failures in words."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_bench.core.digits import fixed, rounded, significant
from flexgen_bench.core.metrics import BOOTSTRAP_LEAST_N, IntervalKind, Summary
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.core.units import format_bytes
from flexgen_bench.report.rows import DiskReads, Memory, Row

HEADERS = (
    "System",
    "Generation tok/s",
    "Predicted tok/s",
    "Batch",
    "Lowest tier",
    "Prefill tok/s",
    "Decode tok/s",
    "Peak memory",
    "Read from disk",
    "Same tokens",
    "Evidence",
)

# Every figure that was not measured carries its mark, so that no column mixes two kinds silently.
MARKS = {
    Evidence.MEASURED: "",
    Evidence.EMULATED: "E",
    Evidence.PROJECTED: "P",
    Evidence.SIMULATED: "S",
    Evidence.QUOTED: "Q",
}
STATUS_WORDS = {
    Status.OK: "ok",
    Status.OOM: "OOM",
    Status.TIMEOUT: "timeout",
    Status.FAILED: "failed",
    Status.INVALID: "invalid",
    Status.UNAVAILABLE: "unavailable",
}
_SHORT_REASON = 48
_LONG_REASON = 600
UNKNOWN = "-"


def cells(row: Row) -> tuple[str, ...]:
    """The cells of one row, in the order of ``HEADERS``; a line break is where a narrow table may break."""
    return (
        row.label,
        _headline(row),
        UNKNOWN if row.predicted is None else _marked(number(row.predicted), Evidence.SIMULATED),
        UNKNOWN if row.batch_size is None else str(row.batch_size),
        row.lowest_tier or UNKNOWN,
        _marked(_value(row.prefill), row.evidence),
        _marked(_value(row.decode), row.evidence),
        _marked(memory_text(row.memory), row.evidence),
        _marked(_disk(row.disk), row.evidence),
        str(row.same_tokens),
        row.evidence.value if row.status is Status.OK else UNKNOWN,
    )


def headers(rows: Sequence[Row]) -> tuple[str, ...]:
    """The columns worth showing: predictions only where there are any."""
    predicted = any(row.predicted is not None for row in rows)
    return HEADERS if predicted else tuple(h for h in HEADERS if h != "Predicted tok/s")


def heading(row: Row) -> str:
    """What all rows of ``row``'s group have in common."""
    weights = f" ({row.weights} weights)" if row.weights else ""
    parts = [
        f"{row.model}{weights}, {row.dtype}",
        f"workload {row.workload}: {row.num_prompts} prompts of {row.prompt_tokens} tokens, "
        f"{row.gen_len} generated each",
        f"hardware {row.hardware}{_caps(row.memory)}",
    ]
    if row.threads:
        parts.append(f"{row.threads} thread{'s' if row.threads > 1 else ''}")
    if row.machine:
        parts.append(f"on {row.machine}")
    return "; ".join(parts)


def failures(rows: Sequence[Row]) -> list[str]:
    """One line for every row that has no figures: who, how it ended, and the whole reason."""
    return [
        f"{r.label}: {STATUS_WORDS[r.status]}. {one_line(r.reason, _LONG_REASON)}"
        for r in rows
        if r.status is not Status.OK
    ]


def remarks(rows: Sequence[Row]) -> list[str]:
    """What stands below a table: what was left out of the workload, each note once, and the failures."""
    notes = dict.fromkeys(str(r.stored.record.validity.get("workload_note") or "") for r in rows)
    return [*(f"workload: {note}" for note in notes if note), *failures(rows)]


def legend(rows: Sequence[Row]) -> list[str]:
    """What the signs in these rows mean; only of signs that occur."""
    kinds = {r.generation.interval for r in rows if r.generation is not None}
    marks = [f"({MARKS[e]}) = {e.value}" for e in Evidence if MARKS[e] and _occurs(e, rows)]
    lines = {
        "Generation tok/s = generated tokens / (prefill + decode time) over all repetitions.": True,
        f"range = slowest to fastest repetition (fewer than {BOOTSTRAP_LEAST_N} repetitions).": IntervalKind.RANGE
        in kinds,
        "95% CI = bootstrap over whole repetitions.": IntervalKind.BOOTSTRAP in kinds,
        "n=1 = one repetition, so no spread is known.": IntervalKind.SINGLE in kinds,
        "Prefill and decode - = they overlap: some prompts are computed while others decode, so neither has a time of "
        "its own.": any(r.generation is not None and r.prefill is None for r in rows),
        "Peak memory counts cached file pages of the cell; without cache = the rest.": any(
            r.memory.host_anonymous for r in rows
        ),
        "Read from disk = bytes per repetition as the kernel counts them (own count: as the system does), "
        "and those over the repetition's whole time.": any(r.disk is not None for r in rows),
        "The fastest of each table is marked (* or bold); only ok, MEASURED, exact rows compete.": any(
            r.best for r in rows
        ),
        "A system with a remark such as (4-bit weights) computes with compressed numbers: its tokens are not compared "
        "with the reference, and it is not marked fastest.": any(r.lossy for r in rows),
        "Predicted = from the machine's constants and a model of the system; nothing measured in the run is in "
        "it.": any(r.predicted is not None for r in rows),
        f"{', '.join(marks)}; figures without a mark are MEASURED.": bool(marks),
    }
    return [line for line, occurs in lines.items() if occurs]


def memory_text(memory: Memory) -> str:
    """``1.75 GiB of 1.75 GiB, enforced (1.20 GiB without cache)``; then the GPU's, where there is one."""
    text = UNKNOWN if memory.host_peak is None else format_bytes(memory.host_peak)
    if memory.host_limit is not None:
        kept = "enforced" if memory.enforced else "not enforced"
        text += f" of {format_bytes(memory.host_limit)},\n{kept}"
    if memory.host_anonymous:
        text += f"\n({format_bytes(memory.host_anonymous)} without cache)"
    if memory.gpu_peak is not None:
        text += f";\ngpu {format_bytes(memory.gpu_peak)}"
        if memory.gpu_limit is not None:
            text += f" of {format_bytes(memory.gpu_limit)}"
    return text


def number(value: float) -> str:
    """Three significant digits without exponent: ``1234``, ``56.7``, ``0.0123``."""
    for least, decimals in ((100, 0), (10, 1), (1, 2), (0.1, 3), (0.01, 4)):
        if abs(rounded(value, 3)) >= least:
            return fixed(value, decimals)
    return significant(value, 3)


def cause(reason: str) -> str:
    """The line of a record's reason that tells most: the first, or of a traceback the last."""
    lines = reason.strip().splitlines() or ["no reason"]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def one_line(text: str, longest: int) -> str:
    """``text`` without line breaks, cut with an ellipsis."""
    flat = " ".join(text.split())
    return flat if len(flat) <= longest else flat[: longest - 3].rstrip() + "..."


def _headline(row: Row) -> str:
    if row.status is not Status.OK:
        reason = one_line(row.reason, _SHORT_REASON)
        return f"{STATUS_WORDS[row.status]}: {reason}" if reason else STATUS_WORDS[row.status]
    summary = row.generation
    if summary is None:
        return UNKNOWN
    value = _marked(number(summary.value), row.evidence)
    low, high = number(summary.low), number(summary.high)
    if summary.interval is IntervalKind.SINGLE:
        return f"{value}\n(n=1)"
    word = "95% CI" if summary.interval is IntervalKind.BOOTSTRAP else "range"
    return f"{value}\n({word} {low} to {high}, n={summary.n})"


def _value(summary: Summary | None) -> str:
    return UNKNOWN if summary is None else number(summary.value)


def _marked(text: str, evidence: Evidence) -> str:
    mark = MARKS[evidence]
    return f"{text} ({mark})" if mark and text != UNKNOWN else text


def _disk(reads: DiskReads | None) -> str:
    if reads is None:
        return UNKNOWN
    text = format_bytes(reads.bytes_per_repetition)
    if reads.bytes_per_repetition:
        text += f",\n{format_bytes(reads.mean_bytes_per_s)}/s"
    return text if reads.counted_by_kernel else f"{text}\n(own count)"


def _caps(memory: Memory) -> str:
    caps = [
        f"{name} at most {format_bytes(limit)}"
        for name, limit in (("host memory", memory.host_limit), ("gpu memory", memory.gpu_limit))
        if limit is not None
    ]
    return f", {', '.join(caps)}" if caps else ""


def _occurs(evidence: Evidence, rows: Sequence[Row]) -> bool:
    predicted = evidence is Evidence.SIMULATED and any(r.predicted is not None for r in rows)
    return predicted or any(r.evidence is evidence for r in rows)
