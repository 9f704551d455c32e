"""How long answers take, lately."""

from __future__ import annotations

import time


class Pace:
    """How long an answer takes, lately: what a client is told that has to come back."""

    def __init__(self) -> None:
        self._seconds = 1.0

    def note(self, begin: float) -> None:
        self._seconds += 0.1 * (time.monotonic() - begin - self._seconds)

    def retry_after(self, waiting: int, at_once: int) -> int:
        """Whole seconds until about so many waiting ones are done."""
        return max(1, min(3600, round(self._seconds * waiting / at_once)))
