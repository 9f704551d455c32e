"""Shows on standard error what a suite is doing; standard output stays free for its results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from flexgen_bench.core.closing import Closing
from flexgen_bench.core.metrics import summarise
from flexgen_bench.core.moment import Moment
from flexgen_bench.core.status import Status
from flexgen_bench.core.units import about, format_bytes, format_seconds
from flexgen_bench.runner.events import RunningCell
from flexgen_bench.store.reader import read_record

# A log file is read later: one line per stage and this many seconds is enough to see where time went.
PLAIN_INTERVAL_S = 10.0
# The bars are redrawn by the process that waits for the cell; seldom enough not to slow the cell down.
_REDRAWS_PER_S = 4


@dataclass
class Meter:
    """How fast one kind of work moves: ``done`` of ``total`` ``unit`` (B or tokens).

    moved / seconds: what was done while somebody watched, and the time it took. Prefill and decode take turns,
    so the time since the previous report of either belongs to the one that reports now.
    """

    unit: str
    total: int
    done: int = 0
    moved: int = 0
    seconds: float = 0.0

    def advance(self, done: int, elapsed_s: float) -> None:
        """Work has come to ``done``, ``elapsed_s`` after the previous report of any kind."""
        if done == 0:  # only says that the work begins
            return
        # Bytes that are there at the first report may come from an earlier, interrupted conversion.
        resumed = self.unit == "B" and self.done == 0
        if not resumed:
            self.moved += done - self.done
            self.seconds += elapsed_s
        self.done = done

    @property
    def rate(self) -> float | None:
        """Units per second; None as long as nothing has moved."""
        return self.moved / self.seconds if self.seconds > 0 else None

    @property
    def left_s(self) -> float | None:
        """Seconds until the end at this rate."""
        return (self.total - self.done) / self.rate if self.rate else None

    def text(self) -> str:
        """``96 of 512 tokens, 12.3 tokens/s, 33.8s left``."""
        rate, left = self.rate, self.left_s
        if self.unit == "B":
            parts = [f"{format_bytes(self.done)} of {format_bytes(self.total)}"]
            speed = "" if rate is None else f"{format_bytes(rate)}/s"
        else:
            parts = [f"{self.done} of {self.total} {self.unit}"]
            speed = "" if rate is None else f"{rate:.1f} {self.unit}/s"
        parts += [speed] if rate else []
        parts += [f"{format_seconds(left)} left"] if left and self.done < self.total else []
        return ", ".join(parts)


def suite_time(expected_s: Sequence[float | None]) -> str:
    """``8 cells, about 4 min`` and what of them takes none or is not known; "" where nothing is to be said."""
    known = [seconds for seconds in expected_s if seconds is not None]
    finished, unknown = known.count(0.0), len(expected_s) - len(known)
    counted = f"{len(expected_s)} cells" if len(expected_s) > 1 else "1 cell"
    if finished == len(expected_s):
        return f"{counted}, nothing left to run" if expected_s else ""
    parts = [about(sum(known))] if sum(known) else []
    parts += [f"{finished} finished or not possible here"] if finished else []
    parts += [f"{unknown} of unknown time"] if unknown else []
    return f"{counted}: {', '.join(parts)}"


class ProgressDisplay(Closing):
    """The display of ``runner/events.py``: bars on a terminal, plain lines elsewhere.

    A bar for the suite and one for the current stage, with its rate and time left. Use it as a context
    manager, or call ``close``. ``clock`` returns seconds (for tests).
    """

    def __init__(self, file: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(file=file or sys.stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._clock = clock
        self._bars = _Bars(self._console) if self._console.is_terminal else None
        self._meters: dict[str, Meter] = {}
        self._stage = ""
        self._begun_s = self._reported_s = self._shown_s = clock()

    def suite_start(self, expected_s: Sequence[float | None]) -> None:
        """A suite begins: says how long it will take, once for all cells."""
        text = suite_time(expected_s)
        if text:
            self._line(text)

    def cell_start(self, label: str, index: int, total: int, expected_s: float | None) -> None:
        """Cell ``index`` (from 1) of ``total`` begins, and will take so many seconds."""
        self._begin_stage("")
        self._begun_s = self._clock()
        time_text = f", {about(expected_s)}" if expected_s else ""
        if self._bars is not None:
            self._bars.suite(label, index - 1, total, time_text)
        else:
            self._line(f"[{index}/{total}] {label}: started{time_text}")

    def cell_runs(self, cell: RunningCell) -> None:
        """Its stages will tell."""

    def moment(self, moment: Moment) -> None:
        """Progress says as much as fits a line."""

    def stage(self, text: str) -> None:
        """The current cell says what it does now."""
        if text == self._stage:
            return
        self._begin_stage(text)
        if self._bars is not None:
            self._bars.stage(text)
        else:
            self._line(f"    {text}")

    def progress(self, what: str, done: int, total: int, unit: str) -> None:
        """``what`` is convert, load, prefill or decode; ``unit`` is B or tokens."""
        now, meter = self._clock(), self._meters.get(what)
        if meter is None or done < meter.done or (unit, total) != (meter.unit, meter.total):
            meter = self._meters[what] = Meter(unit, total)
        meter.advance(done, now - self._reported_s)
        self._reported_s = now
        if self._bars is not None:
            self._bars.advance(f"{self._stage}: {what}" if self._stage else what, meter)
        elif now - self._shown_s >= PLAIN_INTERVAL_S:
            self._shown_s = now
            self._line(f"    {what}: {meter.text()}")

    def cell_end(self, label: str, status: Status, reason: str, record: Path, skipped: bool) -> None:
        """The cell's record is on disk; ``skipped`` when it was there before. Shows its headline."""
        summary = summarise(read_record(record)) if status is Status.OK else None
        parts = [status.value]
        if summary is not None:
            parts.append(f"{summary.value:.2f} {summary.unit} {summary.evidence.value}")
        if status is not Status.OK and reason:
            parts.append(" ".join(reason.split())[:200])
        if skipped:
            parts.append("measured before (rerun=true measures it again)")
        else:
            parts.append(f"took {format_seconds(self._clock() - self._begun_s)}")
        self._begin_stage("")
        self._line(f"{label}: {', '.join(parts)}")
        if self._bars is not None:
            self._bars.cell_done()

    def suite_end(self) -> None:
        """The table says the rest."""

    def close(self) -> None:
        """Take the bars off the terminal. May be called more than once."""
        if self._bars is not None:
            self._bars.stop()

    def _begin_stage(self, text: str) -> None:
        self._stage, self._meters = text, {}
        self._reported_s = self._shown_s = self._clock()

    def _line(self, text: str) -> None:
        self._console.print(Text(text))


class _Figures(ProgressColumn):
    """The text that ``Meter`` makes; kept in the task, so that a redraw needs no arithmetic."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("figures", "")), style="cyan")


class _Bars:
    """The two bars: cells of the suite, and the work of the current stage."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            # On a narrow terminal the bar gives way first, then the name; the figures stay whole.
            TextColumn(
                "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", max_width=28)
            ),
            BarColumn(bar_width=None, table_column=Column(ratio=1, max_width=24)),
            _Figures(table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
            refresh_per_second=_REDRAWS_PER_S,
        )
        self._suite: TaskID | None = None
        self._work: TaskID | None = None

    def suite(self, label: str, done: int, total: int, time_text: str) -> None:
        self._progress.start()
        if self._suite is None:
            self._suite = self._progress.add_task(label, total=total)
        self._progress.update(
            self._suite,
            description=label,
            completed=done,
            total=total,
            figures=f"cell {done + 1} of {total}{time_text}",
        )

    def stage(self, text: str) -> None:
        """A bar that pulses until the stage tells numbers."""
        self._replace_work(text, None)

    def advance(self, name: str, meter: Meter) -> None:
        if self._work is None:
            self._replace_work(name, meter.total)
        assert self._work is not None
        self._progress.update(
            self._work, description=name, completed=meter.done, total=meter.total, figures=meter.text()
        )

    def cell_done(self) -> None:
        if self._suite is not None:
            self._progress.advance(self._suite)
        if self._work is not None:
            self._progress.remove_task(self._work)
            self._work = None

    def stop(self) -> None:
        self._progress.stop()

    def _replace_work(self, text: str, total: int | None) -> None:
        self._progress.start()
        if self._work is not None:
            self._progress.remove_task(self._work)
        self._work = self._progress.add_task(text, total=total)
