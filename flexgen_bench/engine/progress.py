"""How far a lane has come, for those who wait for one of its steps; and the first failure of any lane."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Aborted(RuntimeError):
    """Raised inside a lane when another one has failed."""


class Failure:
    """The first error of any lane, shared by all of them. tell: called with it, from the thread that has failed; wakes
    lanes that wait for something else than a step."""

    def __init__(self, tell: Callable[[BaseException], None] = lambda error: None) -> None:
        self.error: BaseException | None = None
        self._tell = tell

    def set(self, error: BaseException) -> None:
        """Later errors follow from the first one, which is the one to tell."""
        if self.error is None:
            self.error = error
            self._tell(error)


class Progress:
    """The number of the last finished step of a lane. One thread counts, others wait.

    A lane finishes steps far more often than somebody waits, and who waits is woken only when the step it needs is
    done: waking a thread costs more than all the rest of a step's overhead.
    """

    def __init__(self, failure: Failure) -> None:
        self.done = 0
        self._failure = failure
        self._waiting: list[tuple[int, threading.Lock]] = []
        self._guard = threading.Lock()  # of the list

    def reach(self, number: int) -> None:
        """The lane has finished its ``number``-th step."""
        self.done = number
        if self._waiting:
            self._wake(number)

    def wait(self, number: int) -> bool:
        """Block until the ``number``-th step is done; whether that took waiting. Raises Aborted after a failure."""
        if self.done >= number:
            return False
        gate = threading.Lock()
        gate.acquire()
        with self._guard:
            self._waiting.append((number, gate))
        # Whoever finishes the step from here on sees the gate; who did so before is seen here. The same holds for
        # a failure: a lane that ends opens all gates, and sets the failure before.
        if self.done < number and self._failure.error is None:
            gate.acquire()
        if self.done < number:
            raise Aborted
        return True

    def wake_all(self) -> None:
        """Let everybody who waits look at the failure."""
        self._wake(None)

    def _wake(self, reached: int | None) -> None:
        with self._guard:
            waiting, self._waiting = self._waiting, []
            for number, gate in waiting:
                if reached is None or number <= reached:
                    gate.release()
                else:
                    self._waiting.append((number, gate))
