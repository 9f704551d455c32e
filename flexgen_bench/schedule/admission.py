"""Who starts with the next pass: the cohorts of a closed job as its schedule says, or the requests of an open one as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from flexgen_bench.core.policy import Schedule
from flexgen_bench.schedule.cohort import Cohort
from flexgen_bench.schedule.cohorts import Cohorts, Request


class Admission(Protocol):
    """Decides before each pass which waiting sequences move into which free rooms."""

    @property
    def is_empty(self) -> bool:
        """Whether nobody is waiting."""

    @property
    def is_over(self) -> bool:
        """Whether nobody is waiting and nobody can come any more."""

    def admit(self, free: Sequence[int]) -> list[Cohort]:
        """The cohorts that start with the next pass, given the free rooms; each says which it takes."""

    def ended(self, passes: int) -> None:
        """A cohort has left after this many passes."""


class ClosedAdmission:
    """All requests are known.

    Block: when every room is free, all of them are filled. Continuous: cohorts start evenly spread over the passes a
    cohort lives, so that every pass has its share of prefill (compute-bound) beside decode (link-bound) and neither waits for
    the other; a job's first cohort starts at once, and nothing waits while no other cohort runs.
    """

    def __init__(self, schedule: Schedule, cohorts: Cohorts) -> None:
        self._continuous = schedule is Schedule.CONTINUOUS
        self._cohorts = cohorts
        self._waiting = list(range(len(cohorts.groups)))[::-1]
        self._rooms = len(cohorts.rooms)
        self._lifetimes = [cohorts.lifetime]  # passes: as planned, then as seen
        self._credit = 0.0

    @property
    def is_empty(self) -> bool:
        return not self._waiting

    @property
    def is_over(self) -> bool:
        return not self._waiting

    def admit(self, free: Sequence[int]) -> list[Cohort]:
        if not self._continuous:
            count = self._rooms if len(free) == self._rooms else 0
        else:
            self._credit = min(self._credit + self._pace, float(self._rooms))
            count = int(self._credit + 1e-9)
            if len(free) == self._rooms:
                count = max(count, 1)
            count = min(count, len(free))
            self._credit -= min(count, self._credit)
        cohorts = self._cohorts
        return [
            cohorts.start(self._waiting.pop(), cohorts.rooms[room])
            for room in sorted(free)[:count]
            if self._waiting
        ]

    def ended(self, passes: int) -> None:
        self._lifetimes.append(passes)

    @property
    def _pace(self) -> float:
        """Cohorts per pass that keep all rooms in use: rooms over the passes a cohort lately lived."""
        recent = self._lifetimes[-self._rooms :]
        return self._rooms * len(recent) / sum(recent)


class OpenAdmission:
    """Requests come while the job runs. Each starts as soon as there is a free room, first come, first served; a room holds one
    sequence (``Capacity``), so it is free again when that one ends.

    cohorts: of a plan for a capacity. Not for several threads at once.
    """

    def __init__(self, cohorts: Cohorts) -> None:
        self._cohorts = cohorts
        self._waiting: deque[tuple[int, Request]] = deque()

    @property
    def is_empty(self) -> bool:
        return not self._waiting

    @property
    def is_over(self) -> bool:
        return False

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        return len(self._waiting)

    def add(self, number: int, request: Request) -> None:
        """Queue a request that is within the capacity, under a number that no other has."""
        self._waiting.append((number, request))

    def cancel(self, number: int) -> bool:
        """Take a request out of the queue; False if it is not there (any more)."""
        for place, (other, _) in enumerate(self._waiting):
            if other == number:
                del self._waiting[place]
                return True
        return False

    def admit(self, free: Sequence[int]) -> list[Cohort]:
        cohorts = self._cohorts
        return [
            cohorts.start_request(*self._waiting.popleft(), cohorts.rooms[room])
            for room in sorted(free)
            if self._waiting
        ]

    def ended(self, passes: int) -> None:
        pass
