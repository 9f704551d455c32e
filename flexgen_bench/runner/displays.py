"""Several displays as one: the person's, and whoever else follows a suite."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flexgen_bench.core.moment import Moment
from flexgen_bench.core.status import Status
from flexgen_bench.runner.events import Display, RunningCell


class Displays:
    """Shows everything on ``main``, then to each follower. What a follower raises is told once and it hears no more:
    the record is the truth, and nobody who only looks may end a run."""

    def __init__(self, main: Display, *followers: Display) -> None:
        self._main, self._followers = main, list(followers)

    def suite_start(self, expected_s: Sequence[float | None]) -> None:
        self._show(lambda display: display.suite_start(expected_s))

    def cell_start(self, label: str, index: int, total: int, expected_s: float | None) -> None:
        self._show(lambda display: display.cell_start(label, index, total, expected_s))

    def cell_runs(self, cell: RunningCell) -> None:
        self._show(lambda display: display.cell_runs(cell))

    def moment(self, moment: Moment) -> None:
        self._show(lambda display: display.moment(moment))

    def stage(self, text: str) -> None:
        self._show(lambda display: display.stage(text))

    def progress(self, what: str, done: int, total: int, unit: str) -> None:
        self._show(lambda display: display.progress(what, done, total, unit))

    def cell_end(self, label: str, status: Status, reason: str, record: Path, skipped: bool) -> None:
        self._show(lambda display: display.cell_end(label, status, reason, record, skipped))

    def suite_end(self) -> None:
        self._show(lambda display: display.suite_end())

    def _show(self, call: Callable[[Display], None]) -> None:
        call(self._main)
        for follower in list(self._followers):
            try:
                call(follower)
            except Exception as error:
                self._followers.remove(follower)
                name = type(follower).__name__
                print(f"{name} has failed and follows no more: {error!r}. The records are saved.", file=sys.stderr)
