"""What a run of accuracy prints when it is done."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexgen_bench.accuracy.compare.outcome import ModelOutcome, ModeOutcome
from flexgen_bench.core.digits import fixed, power
from flexgen_bench.report.accuracy.formatting import (
    NOTHING,
    advice,
    bits_interval,
    bytes_text,
    change_text,
    error_text,
    left_out_lines,
    p_text,
    points_interval,
    ratio_to_yardstick,
    score_text,
    share_text,
    verdict_text,
    worst_text,
)
from flexgen_bench.report.accuracy.loss import HEADERS, TITLE, basis, loss_rows

_PLAIN_WIDTH = 160
# Columns of the table of losses; the others are in the table above it.
_OF_TEXT = -2


def print_outcome(outcome: ModelOutcome) -> None:
    """Modes, then the tasks of each, controls and advice, on standard output."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    items = sum(len(r.items) for r in outcome.exact.values())
    console.print()
    console.print(
        Text(
            f"{outcome.model}, {outcome.system}, {outcome.dtype}: {len(outcome.exact)} tasks, {items} items; margin "
            f"{outcome.margins}",
            style="bold",
        )
    )
    if outcome.modes:
        _print(console, _MODES, [_mode(m) for m in outcome.modes])
    if rows := loss_rows(outcome):
        console.print(Text(f"{TITLE}; {basis(outcome)}", style="bold"))
        _print(console, HEADERS[:_OF_TEXT], [row[:_OF_TEXT] for row in rows])
    for mode in outcome.modes:
        if mode.comparison is not None and mode.comparison.tasks:
            console.print(Text(f"{mode.mode}: {mode.subject.what}", style="bold"))
            rows = [
                (
                    t.task,
                    str(t.n),
                    t.metric,
                    score_text(t, t.reference),
                    score_text(t, t.score),
                    change_text(t),
                    p_text(t.p_holm),
                    bits_interval(t.bits),
                    str(t.verdict),
                )
                for t in mode.comparison.tasks
            ]
            _print(console, _TASKS, rows)
    if outcome.agreements:
        others = [
            (
                a.task,
                a.reference,
                str(a.n),
                str(len(a.different)),
                str(a.ties),
                power(a.mean, 1, plus=True),
                power(a.largest, 1),
            )
            for a in outcome.agreements
        ]
        console.print(Text("Uncompressed, beside a reference", style="bold"))
        _print(console, ("Task", "Beside", "n", "Differ", "Ties", "Mean difference", "Largest"), others)
    for finding in outcome.findings:
        style = "bold red" if finding.fails else "yellow"
        word = "FAILS" if finding.fails else "note"
        console.print(Text(f"{word}: {finding.mode}: {finding.name}: {finding.text}", style=style))
    for problem in outcome.problems:
        console.print(Text(f"not compared: {problem}", style="yellow"))
    for line in left_out_lines(outcome):
        console.print(Text(f"left out: {line}", style="yellow"), soft_wrap=True)
    if outcome.modes:
        console.print(Text(advice(outcome)))


_MODES = (
    "Mode",
    "Bytes/weight",
    "Weight error",
    "Change, points (95 %)",
    "Added bits/byte (95 %)",
    "/ yardstick",
    "KL, nats",
    "Same argmax",
    "Worst task",
    "Verdict",
)
_TASKS = ("Task", "n", "Metric", "exact", "mode", "Change (95 %)", "p", "Added bits/byte (95 %)", "Verdict")


def _mode(mode: ModeOutcome) -> tuple[str, ...]:
    numbers, comparison = mode.numbers, mode.comparison
    error = None if numbers is None else numbers.weight_error
    text = numbers.divergence[0] if numbers is not None and numbers.divergence else None
    ratio = ratio_to_yardstick(mode)
    return (
        mode.mode,
        bytes_text(mode.bytes_per_weight),
        error_text(error),
        points_interval(comparison.score if comparison else None),
        bits_interval(comparison.bits if comparison else None),
        NOTHING if ratio is None else fixed(ratio, 3),
        NOTHING if text is None else power(text.kl, 2),
        NOTHING if text is None else share_text(text.agree, text.positions),
        worst_text(comparison),
        verdict_text(mode),
    )


def _print(console: Console, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII)
    for number, header in enumerate(headers):
        table.add_column(header, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)
