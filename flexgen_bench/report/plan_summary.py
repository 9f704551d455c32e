"""The summary of a cell before it is run: what would be done, why, what it takes and how long. Nothing in it was
measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from flexgen_bench.config.cell import Cell
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.simulated import Simulated
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import format_bytes, format_seconds
from flexgen_bench.report.cells import number, one_line
from flexgen_bench.report.devices import devices_of
from flexgen_bench.report.settings_text import policy_text, settings_text

_PLAIN_WIDTH = 160
_BAR = 20
_LONG = 900
_WORDS = {
    Status.OK: "fits",
    Status.OOM: "DOES NOT FIT",
    Status.INVALID: "refused",
    Status.UNAVAILABLE: "not possible",
    Status.FAILED: "failed",
}


@dataclass(frozen=True)
class PlanSummary:
    """A cell before its run.

    row: what is predicted. obstacle: why it cannot be run on this machine, "" if it can; fits: False if that is for
    want of room.
    recorded: its newest record in the results folder; done: that one was measured here, so the cell would be skipped.
    first: what has to be made or fetched before the first run.
    """

    cell: Cell
    row: Simulated
    obstacle: str = ""
    fits: bool = True
    recorded: Path | None = None
    done: bool = False
    first: str = ""


def print_plan(summaries: Sequence[PlanSummary], file: IO[str] | None = None) -> None:
    """Print one summary after the other: a line for each thing to know, its name before it."""
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    for summary in summaries:
        console.print()
        console.print(Text(title(summary), style="bold"), soft_wrap=True)
        for name, text in lines(summary):
            style = "bold red" if text.startswith(("DOES NOT FIT", "refused")) else ""
            console.print(Text.assemble((f"  {name:<12}", "cyan"), (text, style)), soft_wrap=True)


def title(summary: PlanSummary) -> str:
    row, job = summary.row, summary.row.job
    count = "as many prompts as a block holds" if job.num_prompts is None else f"{job.num_prompts} prompts"
    named = f"{summary.cell.name}: " if summary.cell.name else ""
    return (
        f"{named}{row.label}, {job.shape.name} ({row.spec.model.weights} weights), {job.dtype}, on "
        f"{devices_of(row.hardware)}; "
        f"{count}, {job.prompt_len} + {job.gen_len} tokens [{Evidence.SIMULATED}]"
    )


def lines(summary: PlanSummary) -> Iterator[tuple[str, str]]:
    """Name and text of each line of a summary."""
    row, done = summary.row, summary.row.prediction
    if done is None:
        word = "no model" if row.model.predictor is None else _WORDS.get(row.status, row.status.value)
        reason = "nobody has written what predicts this system" if word == "no model" else row.reason
        yield "outcome", f"{word}: {one_line(reason, _LONG)}"
    else:
        yield from _prediction(row, done)
    if summary.obstacle:
        word = "here" if summary.fits else "disk"
        yield word, ("" if summary.fits else "DOES NOT FIT: ") + one_line(summary.obstacle, _LONG)
    if summary.first:
        yield "first", summary.first
    if summary.recorded is not None:
        skipped = "is skipped" if summary.done else "made elsewhere or to be looked at again, so it is run"
        yield "recorded", f"{summary.recorded} ({skipped}; rerun=true measures again)"
    elif not summary.obstacle:
        yield "recorded", "no"


def _prediction(row: Simulated, done: Prediction) -> Iterator[tuple[str, str]]:
    chosen = done.settings
    if chosen.get("policy"):
        yield "policy", policy_text(chosen["policy"])
    own = settings_text({k: v for k, v in chosen.items() if k != "policy"})
    if own:
        yield "settings", own
    for line in _as_lines(chosen.get("why")):
        yield "why", line
    for tier in Tier:
        capacity, used = row.hardware.capacity_bytes(tier), done.bytes.get(tier)
        if used is not None and (used or capacity):
            yield f"{tier}", _filled(used, capacity)
    each = "1 block" if done.blocks == 1 else f"{done.blocks} blocks"
    yield (
        "time",
        f"{_phases(done)}, in all {format_seconds(done.total_s)} "
        f"for {done.num_prompts} prompts in {each} of {done.batch_size}",
    )
    decode = done.decode_tok_per_s
    also = "" if decode is None else f" (decode {number(decode)} tok/s)"
    yield "speed", f"{number(done.tok_per_s)} tok/s{also} {Evidence.SIMULATED}"
    yield "bottleneck", done.bottleneck or "unknown"
    # Of the program: waiting, which it does not know, may make another lane the busiest.
    if chosen.get("binding"):
        yield "limits", f"{chosen['binding']} (where the program that placed it has no room)"
    for what, gain in _gains(chosen.get("gains")):
        yield "one more", f"{what}: {gain}"
    yield "writes", f"{format_bytes(done.disk_written_bytes)} to disk"
    for note in done.notes:
        yield "note", one_line(note, _LONG)


def _phases(done: Prediction) -> str:
    prefill, decode = done.phases_s
    if prefill is None or decode is None:
        return "prefill -, decode - (they overlap)"
    return f"prefill {format_seconds(prefill)}, decode {format_seconds(decode)}"


def _filled(used: int, capacity: int | None) -> str:
    if not capacity:
        return format_bytes(used)
    share = used / capacity
    bar = "#" * min(_BAR, round(_BAR * share))
    return f"[{bar:<{_BAR}}] {format_bytes(used)} of {format_bytes(capacity)} ({share:.0%})"


def _gains(gains: Any) -> Iterator[tuple[str, str]]:
    """What each resource would buy, the best first. A linear program promises it, which knows of no waiting: no more
    than that."""
    if not isinstance(gains, Mapping):
        return
    for what, gain in sorted(gains.items(), key=lambda item: -item[1]):
        yield (str(what), f"{gain:+.3g} tok/s in the program that placed it" if abs(gain) > 1e-9 else "nothing")


def _as_lines(value: Any) -> list[str]:
    if not value:
        return []
    return [value] if isinstance(value, str) else [str(line) for line in value]
