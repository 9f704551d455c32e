"""Tables from records alone: for the terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import IO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexgen_bench.core.digits import TIMED, significant
from flexgen_bench.core.metrics import Summary
from flexgen_bench.core.status import Status
from flexgen_bench.report.cells import HEADERS, cells, headers, heading, legend, remarks
from flexgen_bench.report.rows import Row, build_rows
from flexgen_bench.store.reader import read_paths

# Without a terminal there is no width to respect.
_PLAIN_WIDTH = 160
# All columns side by side need about this much; below it they are shown in two tables, speed and resources.
_WIDE = 140
_SPEED = ("System", "Generation tok/s", "Predicted tok/s", "Batch", "Lowest tier", "Prefill tok/s", "Decode tok/s")
_SPLIT = ((*_SPEED, "Same tokens"), ("System", "Peak memory", "Read from disk", "Evidence"))


def print_table(paths: Iterable[Path], file: IO[str] | None = None) -> None:
    """Print the tables of these records (to standard output, or ``file``); unusable ones are named below.

    Colours and lines on a terminal, plain text elsewhere.
    """
    records, problems = read_paths(paths)
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    rows = build_rows(records)
    for group in by_group(rows):
        console.print()
        console.print(Text(heading(group[0]), style="bold"))
        shown = headers(group)
        for names in (HEADERS,) if console.width >= _WIDE else _SPLIT:
            columns = [name for name in names if name in shown]
            console.print(_rich_table(group, columns, plain=not console.is_terminal))
        for line in remarks(group):
            console.print(Text(line), soft_wrap=True)
    for problem in problems:
        console.print(Text(f"not shown: {problem.message}", style="red"), soft_wrap=True)
    if rows:
        console.print(Text(" ".join(legend(rows)), style="dim"), soft_wrap=not console.is_terminal)


def to_markdown(rows: Sequence[Row]) -> str:
    """One Markdown table per group under its heading; the fastest row's throughput in bold."""
    lines = []
    for group in by_group(rows):
        lines += [f"**{escape(heading(group[0]))}**", ""]
        shown = headers(group)
        lines += [_line(shown), _line("---" for _ in shown)]
        for row in group:
            named = dict(zip(HEADERS, cells(row), strict=True))
            texts = [escape(named[column]) for column in shown]
            if row.best:
                texts[1] = f"**{texts[1]}**"
            lines.append(_line(texts))
        lines.append("")
        below = remarks(group)
        if below:
            lines += [*(f"- {escape(line)}" for line in below), ""]
    if rows:
        lines += [escape(" ".join(legend(rows))), ""]
    return "\n".join(lines)


def to_csv(rows: Sequence[Row], results_dir: Path) -> str:
    """Every row; units are in the column names, figures have the digits of their kind (``core.digits``), the records
    all of them. Paths are relative to ``results_dir``."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for index, row in enumerate(rows):
        named = dict(csv_values(row, results_dir))
        if index == 0:
            writer.writerow(named)
        writer.writerow([_printed(value) for value in named.values()])
    return out.getvalue()


def by_group(rows: Sequence[Row]) -> list[list[Row]]:
    """``build_rows`` keeps groups together; this cuts between them."""
    return [list(members) for _, members in groupby(rows, key=lambda r: r.group)]


def escape(text: str) -> str:
    """Text that Markdown shows as it is, in a table cell too."""
    for sign in ("\\", "`", "*", "_", "|", "[", "]", "#"):
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())


def _rich_table(rows: Sequence[Row], columns: Sequence[str], plain: bool) -> Table:
    table = Table(box=box.ASCII if plain else box.SIMPLE_HEAD, show_lines=True)
    table.padding = (0, 1) if plain else (0, 1, 0, 0)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "System")
    for row in rows:
        named = dict(zip(HEADERS, cells(row), strict=True))
        texts = {name: Text(cell) for name, cell in named.items()}
        throughput = named["Generation tok/s"]
        if row.best:
            texts["Generation tok/s"] = Text(f"* {throughput}", style="bold green")
        elif row.status is not Status.OK:  # the reason stands below the table, in full
            texts["Generation tok/s"] = Text(throughput.partition(":")[0], style="bold red")
        table.add_row(*(texts[column] for column in columns))
    return table


def csv_values(row: Row, results_dir: Path) -> Iterator[tuple[str, object]]:
    """Column names with the unrounded values of one row; None where there is no figure."""
    record = row.stored.record
    yield from (
        ("suite", record.suite),
        ("system", row.system),
        ("lossy", row.lossy),
        ("model", row.model),
        ("weights", row.weights),
        ("dtype", row.dtype),
        ("workload", row.workload),
        ("prompt_tokens", row.prompt_tokens),
        ("gen_len", row.gen_len),
        ("num_prompts", row.num_prompts),
        ("hardware", row.hardware),
        ("machine", row.machine),
        ("threads", row.threads),
        ("batch_size", row.batch_size),
        ("lowest_tier", row.lowest_tier),
        ("status", row.status.value),
        ("reason", row.reason),
        ("evidence", row.evidence.value),
        ("fastest", row.best),
    )
    yield from _csv_summary("generation_tok_per_s", row.generation)
    yield "predicted_tok_per_s", row.predicted
    for name, summary in (("prefill", row.prefill), ("decode", row.decode)):
        yield f"{name}_tok_per_s", None if summary is None else summary.value
    memory, disk = row.memory, row.disk
    yield from (
        ("host_peak_bytes", memory.host_peak),
        ("host_peak_anonymous_bytes", memory.host_anonymous),
        ("host_limit_bytes", memory.host_limit),
        ("limit_enforced", memory.enforced),
        ("gpu_peak_bytes", memory.gpu_peak),
        ("gpu_limit_bytes", memory.gpu_limit),
        ("disk_read_bytes_per_repetition", disk and disk.bytes_per_repetition),
        ("disk_read_mean_bytes_per_s", disk and disk.mean_bytes_per_s),
        ("disk_read_busy_bytes_per_s", disk and disk.busy_bytes_per_s),
        ("disk_read_counted_by_kernel", disk and disk.counted_by_kernel),
        ("same_tokens", str(row.same_tokens)),
        ("spec_hash", record.spec_hash),
        ("run_id", record.run_id),
        ("record", os.path.relpath(row.stored.path, results_dir)),
    )


def _csv_summary(name: str, summary: Summary | None) -> Iterator[tuple[str, object]]:
    yield name, None if summary is None else summary.value
    yield f"{name}_low", None if summary is None else summary.low
    yield f"{name}_high", None if summary is None else summary.high
    yield f"{name}_interval", None if summary is None else summary.interval.value
    yield "repetitions", None if summary is None else summary.n


def _printed(value: object) -> object:
    """Every float of a row is a rate, or a count that was divided by repetitions."""
    if isinstance(value, float):
        return significant(value, TIMED)
    return "" if value is None else value


def _line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"
