"""Tables of what was predicted, next to what the paper printed: for the terminal, and as JSON values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.simulated import Simulated
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import format_bytes, format_seconds
from flexgen_bench.report.cells import MARKS, STATUS_WORDS, UNKNOWN, number, one_line
from flexgen_bench.report.printed_beside import printed_beside, ratio_beside, why_no_ratio
from flexgen_bench.report.settings_text import settings_text

_PLAIN_WIDTH = 160
_S, _Q = f" ({MARKS[Evidence.SIMULATED]})", f" ({MARKS[Evidence.QUOTED]})"
_SPEED = (
    "System",
    "tok/s",
    "Paper tok/s",
    "Ratio",
    "Decode tok/s",
    "Paper decode",
    "Block latency",
    "Prefill",
    "Decode",
    "Evidence",
)
_HOW = ("System", "Batch", "gpu memory", "cpu memory", "disk", "Bottleneck", "Settings", "Evidence")
_WORDS = STATUS_WORDS | {Status.INVALID: "refused", Status.UNAVAILABLE: "cannot run"}
_LONG_REASON = 900


def print_predictions(
    rows: Sequence[Simulated], why: str, tables: Path, file: IO[str] | None = None
) -> None:
    """Print two tables for each job that was predicted: how fast, and by what means.

    why: what is missing to measure instead. tables: the paper's values, as a CSV file.
    """
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    plain = not console.is_terminal
    if plain:
        console.width = _PLAIN_WIDTH
    for job in by_job(rows):
        console.print()
        console.print(Text(heading(job[0]), style="bold"), soft_wrap=True)
        for columns in (_SPEED, _HOW):
            console.print(_table(job, columns, tables, plain))
        for line in remarks(job):
            console.print(Text(line), soft_wrap=True)
    if rows:
        console.print(Text(" ".join(legend(rows, why, tables)), style="dim"), soft_wrap=True)


def by_job(rows: Iterable[Simulated]) -> list[list[Simulated]]:
    """Rows that may stand in one table, the same model, lengths and machine, in the order asked. Fastest first, what does not work last."""
    jobs: dict[tuple[Any, ...], list[Simulated]] = {}
    for row in rows:
        jobs.setdefault(_job(row), []).append(row)
    return [sorted(job, key=_order) for job in jobs.values()]


def heading(row: Simulated) -> str:
    """What all rows of a job have in common."""
    asked, hardware = row.question, row.hardware
    sizes = {tier: hardware.capacity_bytes(tier) for tier in Tier}
    held = ", ".join(f"{tier} {format_bytes(size)}" for tier, size in sizes.items() if size)
    many = "as many as a block holds" if asked.num_prompts is None else str(asked.num_prompts)
    return (
        f"SIMULATED, nothing was run: {asked.shape.name}, {asked.dtype}; prompts of {asked.prompt_len} tokens, "
        f"{asked.gen_len} generated each, {many}; hardware {hardware.name} ({held})"
    )


def remarks(rows: Sequence[Simulated]) -> list[str]:
    """Why rows have no figures, and what is to be known about those that do."""
    lines = []
    for row in rows:
        if row.prediction is not None and row.prediction.notes:
            lines.append(f"{row.label}: {one_line('; '.join(row.prediction.notes), _LONG_REASON)}")
        elif row.status is not Status.OK and row.model.predictor is not None:
            lines.append(f"{row.label}: {_word(row)}. {one_line(row.reason, _LONG_REASON)}")
    unknown = [row.label for row in rows if row.model.predictor is None]
    if unknown:
        lines.append(f"no model, so no prediction: {', '.join(unknown)}")
    return lines


def legend(rows: Sequence[Simulated], why: str, tables: Path) -> list[str]:
    """What the signs mean, and why nothing was measured."""
    lines = [
        f"(S) = SIMULATED: predicted from the machine's constants and a model of each system. {why}"
    ]
    if any(printed_beside(row, tables) for row in rows):
        lines.append(
            "(Q) = QUOTED: printed in the FlexGen paper for one T4 with 208 GB of host memory; "
            "FlexGen(c) stands beside the row that compresses as it did, or may."
        )
        if any(ratio_beside(row, tables) is not None for row in rows):
            lines.append("Ratio = predicted / printed.")
        lines += dict.fromkeys(filter(None, (why_no_ratio(row, tables) for row in rows)))
    if any(row.prediction is not None and row.prediction.overlapped for row in rows):
        lines.append(
            "Prefill and decode are - where prompts are computed while others decode (a continuous schedule): only the total means something, and block "
            "latency is what a sequence takes on average."
        )
    if any(row.question.num_prompts is None for row in rows):
        lines.append(
            "As in the paper, each system runs as many prompts as one block of its own holds (four of them "
            "where blocks may overlap, start and end included); "
            "workload.num_prompts=N gives all of them the same job."
        )
    return lines


def to_json(row: Simulated, tables: Path) -> dict[str, Any]:
    """The row as JSON values; figures unrounded, units in their names."""
    asked, quoted = row.question, printed_beside(row, tables)
    policy = row.spec.policy
    data: dict[str, Any] = {
        "evidence": Evidence.SIMULATED.value,
        "system": row.system,
        "lossy": "" if row.lossy.is_exact else str(row.lossy),
        "model": asked.shape.name,
        "dtype": asked.dtype.value,
        "hardware": row.hardware.name,
        "workload": row.spec.workload.name,
        "prompt_len": asked.prompt_len,
        "gen_len": asked.gen_len,
        "policy_asked_for": None if policy is None else policy.to_dict(),
        "spec_hash": row.spec.spec_hash,
        "status": row.status.value,
        "reason": row.reason,
    }
    if row.tier:
        data |= {
            "tier": row.tier,
            "need_bytes": row.need_bytes,
            "capacity_bytes": row.capacity_bytes,
        }
    if row.prediction is not None:
        data |= _figures(row.prediction)
    if quoted is not None:
        data["quoted"] = {
            "evidence": Evidence.QUOTED.value,
            "printed_as": row.model.printed_as + ("" if row.lossy.is_exact else "(c)"),
            "tok_per_s": "OOM" if quoted.out_of_memory else quoted.tok_per_s,
            "decode_tok_per_s": quoted.decode_tok_per_s,
            "policy": quoted.policy,
        }
    plain: dict[str, Any] = json.loads(json.dumps(data, default=str))
    return plain


def _figures(done: Prediction) -> dict[str, Any]:
    prefill_s, decode_s = done.phases_s
    return {
        "num_prompts": done.num_prompts,
        "batch_size": done.batch_size,
        "tok_per_s": done.tok_per_s,
        "decode_tok_per_s": done.decode_tok_per_s,
        "prefill_tok_per_s": done.prefill_tok_per_s,
        "prefill_s": prefill_s,
        "decode_s": decode_s,
        "total_s": done.total_s,
        "overlapped": done.overlapped,
        "block_latency_s": done.block_latency_s,
        "bytes": {str(tier): count for tier, count in done.bytes.items()},
        "lane_busy_s": {str(lane): seconds for lane, seconds in done.lane_busy_s.items()},
        "bottleneck": done.bottleneck,
        "disk_written_bytes": done.disk_written_bytes,
        "settings": _plain(done.settings),
        "notes": list(done.notes),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _job(row: Simulated) -> tuple[Any, ...]:
    asked, hardware = row.question, row.hardware
    return (
        asked.shape.name,
        asked.dtype.value,
        asked.prompt_len,
        asked.gen_len,
        asked.num_prompts or 0,
        hardware.name,
        hardware.gpu_memory_bytes or 0,
        hardware.cpu_memory_bytes or 0,
        tuple(sorted(hardware.links.items())),
    )


def _order(row: Simulated) -> tuple[Any, ...]:
    speed = 0.0 if row.prediction is None else row.prediction.tok_per_s
    return (-speed, list(Status).index(row.status), row.label)


def _table(rows: Sequence[Simulated], columns: Sequence[str], tables: Path, plain: bool) -> Table:
    table = Table(box=box.ASCII if plain else box.SIMPLE_HEAD)
    table.padding = (0, 1) if plain else (0, 1, 0, 0)
    for column in columns:
        least = 18 if column == "System" else None
        table.add_column(column, overflow="fold", no_wrap=column == "Evidence", min_width=least)
    for row in rows:
        named = cells(row, tables)
        texts = {column: Text(named[column]) for column in columns}
        if row.status is not Status.OK and "tok/s" in texts:
            texts["tok/s"].stylize("bold red")
        table.add_row(*texts.values())
    return table


def cells(row: Simulated, tables: Path) -> dict[str, str]:
    """The texts of one row, by column."""
    quoted, ratio = printed_beside(row, tables), ratio_beside(row, tables)
    texts = {
        "System": row.label,
        "Evidence": UNKNOWN if row.model.predictor is None else Evidence.SIMULATED.value,
        "tok/s": _word(row),
        "Ratio": UNKNOWN if ratio is None else f"{ratio:.2f}",
        "Paper tok/s": UNKNOWN,
        "Paper decode": UNKNOWN,
    }
    if quoted is not None:
        texts["Paper tok/s"] = quoted.generation.value + _Q
        if quoted.decoding is not None:
            texts["Paper decode"] = quoted.decoding.value + _Q
    done = row.prediction
    if done is not None:
        decode, (prefill_s, decode_s) = done.decode_tok_per_s, done.phases_s
        texts |= {
            "tok/s": number(done.tok_per_s) + _S,
            "Decode tok/s": UNKNOWN if decode is None else number(decode) + _S,
            "Block latency": _seconds(done.block_latency_s),
            "Prefill": _seconds(prefill_s),
            "Decode": _seconds(decode_s),
            "Batch": str(done.batch_size),
            "Bottleneck": done.bottleneck or UNKNOWN,
            "Settings": settings_text(done.settings) or UNKNOWN,
        }
        sizes = {str(tier): size for tier, size in done.bytes.items()}
        texts |= {
            name: format_bytes(sizes[tier]) + _S
            for tier, name in _TIER_COLUMNS.items()
            if sizes.get(tier)
        }
    elif row.tier in _TIER_COLUMNS and row.need_bytes and row.capacity_bytes:
        need, there = format_bytes(row.need_bytes), format_bytes(row.capacity_bytes)
        texts[_TIER_COLUMNS[row.tier]] = f"{need}{_S} of {there}"
    return {column: texts.get(column, UNKNOWN) for column in {*_SPEED, *_HOW}}


def _seconds(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else format_seconds(seconds) + _S


_TIER_COLUMNS = {"gpu": "gpu memory", "cpu": "cpu memory", "disk": "disk"}


def _word(row: Simulated) -> str:
    if row.status is Status.OOM:
        return f"OOM on {row.tier}{_S}" if row.tier else f"OOM{_S}"
    return "no model" if row.model.predictor is None else _WORDS[row.status]
