"""Results on their way from the lanes of a running job to whoever asked for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from flexgen_bench.core.progress import Progress


class Arrivals:
    """Lanes put results in as they appear; the thread that runs the job takes them out when it is told of progress.

    So what a caller does with a result (writing it to a file, say) holds up no lane and needs no lock of its own.
    """

    def __init__(self, progress: Progress, take: Callable[[int, Any], None]) -> None:
        self._progress, self._take = progress, take
        self._waiting: deque[tuple[int, Any]] = deque()  # safe between threads
        self._has_failed = False

    def put(self, index: int, result: Any) -> None:
        """Called by a lane."""
        self._waiting.append((index, result))

    def progress(self, what: str, done: int, total: int) -> None:
        """For the engine, in place of the caller's own."""
        self.deliver()
        self._progress(what, done, total)

    def deliver(self) -> None:
        """Hand over what has arrived; to a ``take`` that has failed, nothing more."""
        while self._waiting and not self._has_failed:
            self._has_failed = True
            self._take(*self._waiting.popleft())
            self._has_failed = False
