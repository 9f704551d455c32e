"""How a batch goes, while it goes and when it is over."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flexgen_bench.core.tiers import Lane
from flexgen_bench.core.units import format_seconds
from flexgen_bench.engine.job_run import JobResult

_EVERY_S = 10.0  # between lines, where no terminal shows a bar


@dataclass
class Totals:
    """What this run has done so far. busy: seconds that each lane worked, of ``seconds`` that jobs took."""

    answered: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    job_s: float = 0.0
    busy_s: dict[Lane, float] = field(default_factory=dict)


class BatchProgress:
    """A bar on a terminal, a line every ten seconds elsewhere: requests, tokens a second, time left, the bottleneck.

    total: lines to answer; done: of these, by earlier runs. Use as a context manager.
    """

    def __init__(self, total: int, done: int, console: Console | None = None) -> None:
        self.totals = Totals()
        self._total, self._before = total, done
        self._console = console or Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("requests"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=done)
        self._begin = self._told = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def answered(self, prompt_tokens: int, answer_tokens: int) -> None:
        self.totals.answered += 1
        self.totals.prompt_tokens += prompt_tokens
        self.totals.answer_tokens += answer_tokens
        self._tell()

    def refused(self) -> None:
        self.totals.refused += 1
        self._tell()

    def job_done(self, result: JobResult) -> None:
        self.totals.job_s += result.prefill_s + result.decode_s
        for lane, use in result.lanes.items():
            self.totals.busy_s[lane] = self.totals.busy_s.get(lane, 0.0) + use.busy_s

    def __enter__(self) -> BatchProgress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def _tell(self) -> None:
        totals = self.totals
        now_done = totals.answered + totals.refused
        words = f"{totals.answer_tokens / max(self.seconds, 1e-9):.0f} new tok/s{self.bottleneck}"
        self._bar.update(self._task, completed=self._before + now_done, description=words)
        if not self._console.is_terminal and time.monotonic() - self._told >= _EVERY_S:
            self._told = time.monotonic()
            left = (self._total - self._before - now_done) * self.seconds / max(now_done, 1)
            place = f"{self._before + now_done}/{self._total} requests"
            self._console.print(f"{place}, {words}, about {format_seconds(left)} left", soft_wrap=True)

    @property
    def bottleneck(self) -> str:
        """The lane that worked most; empty before the first job has ended."""
        if not self.totals.busy_s or not self.totals.job_s:
            return ""
        lane, busy = max(self.totals.busy_s.items(), key=lambda item: item[1])
        return f", bound by {lane} ({min(1.0, busy / self.totals.job_s):.0%} busy)"


def summary(progress: BatchProgress, price_per_hour: float | None) -> str:
    """What a run has done, in a few lines. MEASURED, of this run alone."""
    totals, seconds = progress.totals, progress.seconds
    lines = [
        f"{totals.answered} answered, {totals.refused} bad lines, in {format_seconds(seconds)}{progress.bottleneck}",
        f"{totals.prompt_tokens} prompt tokens, {totals.answer_tokens} new ones: "
        f"{totals.answer_tokens / max(seconds, 1e-9):.1f} new tok/s",
    ]
    if price_per_hour is not None and totals.answer_tokens:
        cost = price_per_hour * seconds / 3600
        each = cost / totals.answer_tokens * 1e6
        lines.append(f"{cost:.4f} USD at {price_per_hour:g} USD/h: {each:.2f} USD per million new tokens")
    return "\n".join(lines)
