"""Tables of what was predicted, next to what the paper printed: for the terminal, and as JSON values."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexgen_bench.core.simulated import Simulated
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import format_bytes, format_seconds
from flexgen_bench.published.comparison import published_for, ratio_to_published, why_no_ratio
from flexgen_bench.report.cells import MARKS, STATUS_WORDS, UNKNOWN, number, one_line
from flexgen_bench.report.devices import devices_of
from flexgen_bench.report.settings_text import settings_text

_PLAIN_WIDTH = 160
_S, _Q = f" ({MARKS[Evidence.SIMULATED]})", f" ({MARKS[Evidence.QUOTED]})"
# One meaning a column. Columns in which no row has anything are left out.
_TOK, _PAPER, _ERROR = f"tok/s{_S}", f"Paper tok/s{_Q}", "Model error"
_OVER_PAPER, _OVER_MODEL = f"Speed-up over paper{_Q}", f"Speed-up over original{_S}"
_DECODE, _PAPER_DECODE = f"Decode tok/s{_S}", f"Paper decode tok/s{_Q}"
_SPEED = ("System", _TOK, _PAPER, _ERROR, _OVER_PAPER, _OVER_MODEL, _DECODE, _PAPER_DECODE)
_BLOCK, _BLOCK_S, _JOB, _JOB_S = ("Block size", f"Block takes{_S}", "Job size", f"Job takes{_S}")
_PREFILL_S, _DECODE_S = f"Prefill{_S}", f"Decode{_S}"
_TIME = ("System", _BLOCK, _BLOCK_S, _JOB, _JOB_S, _PREFILL_S, _DECODE_S)
_TIER_COLUMNS = {tier: f"{tier} memory{_S}" for tier in ("gpu", "cpu")} | {"disk": f"disk{_S}"}
_BOUND = f"Bottleneck{_S}"
_HOW = ("System", *_TIER_COLUMNS.values(), _BOUND)
_ALWAYS = ("System", _TOK)
_WORDS = STATUS_WORDS | {Status.INVALID: "refused", Status.UNAVAILABLE: "cannot run"}
_LONG_REASON = 900
_LEAST, _BETWEEN = 20, 3  # letters of a system's name at least, and around a column
AS_ASKED = "as asked for"  # what a policy that is given says of itself


def print_predictions(rows: Sequence[Simulated], why: str, tables: Path, file: IO[str] | None = None) -> None:
    """Print for each job that was predicted how fast, how long and where, and below that by what means and why.

    why: what is missing to measure instead. tables: the paper's values, as a CSV file.
    """
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    plain = not console.is_terminal
    if plain and "COLUMNS" not in os.environ:
        console.width = _PLAIN_WIDTH
    for job in by_job(rows):
        console.print()
        console.print(Text(heading(job[0]), style="bold"), soft_wrap=plain)
        for columns in (_SPEED, _TIME, _HOW):
            for table in _tables(job, columns, tables, console):
                console.print(table)
        for title, lines in (("Why", whys(job)), ("Settings", settings(job)), ("", remarks(job))):
            if title and lines:
                console.print(Text(f"{title}:", style="bold"))
            for line in lines:
                console.print(Text(f"  {line}" if title else line), soft_wrap=plain)
    if rows:
        console.print()
        for line in legend(rows, why, tables):
            console.print(Text(line, style="dim"), soft_wrap=plain)


def by_job(rows: Iterable[Simulated]) -> list[list[Simulated]]:
    """Rows that may stand in one table, the same model, lengths and machine, in the order asked. Fastest first, what
    does not work last."""
    jobs: dict[tuple[Any, ...], list[Simulated]] = {}
    for row in rows:
        jobs.setdefault(_job(row), []).append(row)
    return [sorted(job, key=_order) for job in jobs.values()]


def heading(row: Simulated) -> str:
    """What all rows of a job have in common."""
    job, hardware = row.job, row.hardware
    sizes = {tier: hardware.capacity_bytes(tier) for tier in Tier}
    held = ", ".join(f"{tier} {format_bytes(size)}" for tier, size in sizes.items() if size)
    many = "as many as a block holds" if job.num_prompts is None else f"{job.num_prompts} of them"
    return (
        f"SIMULATED, nothing was run: {job.shape.name}, {job.dtype}; prompts of {job.prompt_len} tokens, "
        f"{job.gen_len} generated each, {many}; hardware {devices_of(hardware)} ({held})"
    )


def whys(rows: Sequence[Simulated]) -> list[str]:
    """One sentence for each system that says why it works as it does."""
    reasons = ((row, row.prediction.settings.get("why")) for row in rows if row.prediction)
    return [f"{row.label}: {_sentence(why)}" for row, why in reasons if why]


def _sentence(why: Any) -> str:
    """The first of what a system says that is more than whose choice it was, or both."""
    lines = [why] if isinstance(why, str) else list(map(str, why))
    return "; ".join(lines[:2] if lines[0] == AS_ASKED else lines[:1]) + "."


def settings(rows: Sequence[Simulated]) -> list[str]:
    """What each system ran with."""
    predicted = ((row, row.prediction) for row in rows if row.prediction)
    return [f"{row.label}: {text}" for row, done in predicted if (text := settings_text(done.settings))]


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
    lines = [f"(S) = SIMULATED: predicted from the machine's constants and a model of each system. {why}"]
    if any(published_for(row, tables) for row in rows):
        lines.append(
            "(Q) = QUOTED: printed in the FlexGen paper for one T4 with 208 GB of host memory; "
            "FlexGen(c) stands beside the row that compresses as it did, or may."
        )
        lines += dict.fromkeys(filter(None, (why_no_ratio(row, tables) for row in rows)))
    if any(model_error(row, tables) is not None for row in rows):
        lines.append(
            f"{_ERROR} = simulated / printed - 1, for a system that the paper ran: how far to trust the model of it."
        )
    if any(speed_up(row, tables) is not None for row in rows):
        lines.append(f"{_OVER_PAPER} = this engine's simulated tok/s / those that the paper prints for FlexGen.")
    if any(_original(row, rows) for row in rows):
        lines.append(f"{_OVER_MODEL} = this engine's / those of the original system, both simulated here.")
    if any(row.prediction is not None for row in rows):
        lines.append("Sizes are in prompts: a block shares each load of the weights, a job is one block or more.")
    ours = dict.fromkeys(row.system for row in rows if row.model.follows_policy)
    if ours:
        lines.append(f"{', '.join(ours)} = this project's engine.")
    if any(row.prediction is not None and row.prediction.overlapped for row in rows):
        lines.append(
            "Prefill and decode are - where prompts are computed while others decode (a continuous schedule): only "
            "the total means something, and what a "
            "block takes is what a sequence takes on average."
        )
    if any(row.job.num_prompts is None for row in rows):
        lines.append(
            "As in the paper, each system runs as many prompts as one block of its own holds (four of them "
            "where blocks may overlap, start and end included); "
            "workload.num_prompts=N gives all of them the same job."
        )
    return lines


def _job(row: Simulated) -> tuple[Any, ...]:
    job, hardware = row.job, row.hardware
    return (
        job.shape.name,
        job.dtype.value,
        job.prompt_len,
        job.gen_len,
        job.num_prompts or 0,
        devices_of(hardware),
        hardware.gpu_memory_bytes or 0,
        hardware.cpu_memory_bytes or 0,
        tuple(sorted(hardware.links.items())),
    )


def _order(row: Simulated) -> tuple[Any, ...]:
    speed = 0.0 if row.prediction is None else row.prediction.tok_per_s
    return (-speed, list(Status).index(row.status), row.label)


def _tables(rows: Sequence[Simulated], columns: Sequence[str], tables: Path, console: Console) -> Iterator[Table]:
    """The columns in one table; in several, below each other, where the console is too narrow for one."""
    named = [cells(row, tables, rows) for row in rows]
    first, *shown = [c for c in columns if c in _ALWAYS or any(row[c] != UNKNOWN for row in named)]
    plain = not console.is_terminal
    parts: list[list[str]] = [[]]
    name = min(max(len(row.label) for row in rows), max(_LEAST, console.width // 4))
    left = whole = console.width - name - 2 * _BETWEEN
    for column in shown:
        words = (word for text in (column, *(row[column] for row in named)) for word in text.split())
        needed = max(map(len, words)) + _BETWEEN
        if needed > left and parts[-1]:
            parts.append([])
            left = whole
        parts[-1].append(column)
        left -= needed
    for part in parts:
        yield _table(rows, named, [first, *part], name, plain)


def _table(
    rows: Sequence[Simulated], named: Sequence[Mapping[str, str]], columns: Sequence[str], name: int, plain: bool
) -> Table:
    table = Table(box=box.ASCII if plain else box.SIMPLE_HEAD)
    table.padding = (0, 1) if plain else (0, 1, 0, 0)
    for column in columns:
        table.add_column(column, width=name if column == "System" else None)
    for row, texts in zip(rows, named, strict=True):
        line = {column: Text(texts[column]) for column in columns}
        if row.status is not Status.OK and _TOK in line:
            line[_TOK].stylize("bold red")
        table.add_row(*line.values())
    return table


def model_error(row: Simulated, tables: Path) -> float | None:
    """Simulated / printed - 1, of a system that the paper ran; None for this engine, and where the two may not be
    divided."""
    ratio = None if row.model.follows_policy else ratio_to_published(row, tables)
    return None if ratio is None else ratio - 1


def speed_up(row: Simulated, tables: Path) -> float | None:
    """This engine's tok/s over those printed for the system it is built after; None for others, and where the two may
    not be divided."""
    return ratio_to_published(row, tables) if row.model.follows_policy else None


def _original(row: Simulated, rows: Sequence[Simulated]) -> Simulated | None:
    """Of a row of this engine, the fastest of the system it is built after that changes as much of the results:
    nothing, or something."""
    if not (row.model.follows_policy and row.model.printed_as and row.prediction):
        return None
    others = [
        other
        for other in rows
        if other.model.printed_as == row.model.printed_as
        and not other.model.follows_policy
        and other.lossy.is_exact == row.lossy.is_exact
        and other.prediction is not None
        and (other.job.num_prompts, other.job.max_latency_s) == (row.job.num_prompts, row.job.max_latency_s)
    ]
    return max(others, key=lambda one: one.prediction.tok_per_s if one.prediction else 0, default=None)


def cells(row: Simulated, tables: Path, rows: Sequence[Simulated] = ()) -> dict[str, str]:
    """The texts of one row, by column. rows: those of the same job, among which the original system may be."""
    quoted, done = published_for(row, tables), row.prediction
    error, gain, original = model_error(row, tables), speed_up(row, tables), _original(row, rows)
    texts = {"System": row.label, _TOK: _word(row)}
    if error is not None:
        texts[_ERROR] = f"{error:+.0%}"
    if gain is not None:
        texts[_OVER_PAPER] = f"{gain:.2f}x"
    if original is not None and original.prediction is not None and done is not None:
        texts[_OVER_MODEL] = f"{done.tok_per_s / original.prediction.tok_per_s:.2f}x"
    if quoted is not None:
        texts[_PAPER] = quoted.generation.value
        if quoted.decoding is not None:
            texts[_PAPER_DECODE] = quoted.decoding.value
    if done is not None:
        decode, (prefill_s, decode_s) = done.decode_tok_per_s, done.phases_s
        texts |= {
            _TOK: number(done.tok_per_s),
            _DECODE: UNKNOWN if decode is None else number(decode),
            _BLOCK: str(done.batch_size),
            _BLOCK_S: _seconds(done.block_latency_s),
            _JOB: str(done.num_prompts),
            _JOB_S: _seconds(done.total_s),
            _PREFILL_S: _seconds(prefill_s),
            _DECODE_S: _seconds(decode_s),
            _BOUND: done.bottleneck or UNKNOWN,
        }
        sizes = {str(tier): size for tier, size in done.bytes.items()}
        texts |= {name: format_bytes(sizes[tier]) for tier, name in _TIER_COLUMNS.items() if sizes.get(tier)}
    elif row.tier in _TIER_COLUMNS and row.need_bytes and row.capacity_bytes:
        need, there = format_bytes(row.need_bytes), format_bytes(row.capacity_bytes)
        texts[_TIER_COLUMNS[row.tier]] = f"{need} of {there}"
    return {column: texts.get(column, UNKNOWN) for column in {*_SPEED, *_TIME, *_HOW}}


def _seconds(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else format_seconds(seconds)


def _word(row: Simulated) -> str:
    if row.status is Status.OOM:
        return f"OOM on {row.tier}" if row.tier else "OOM"
    return "no model" if row.model.predictor is None else _WORDS[row.status]
