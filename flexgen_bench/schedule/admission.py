"""When cohorts of a job start: block by block, or one after the other as room frees."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_bench.core.policy import Schedule


class Admission:
    """Decides before each pass which waiting cohorts move into which free rooms.

    Block: when every room is free, all of them are filled. Continuous: cohorts start evenly spread over the passes a
    cohort lives, so that every pass has its share of prefill (compute-bound) beside decode (link-bound) and neither waits for
    the other; a job's first cohort starts at once, and nothing waits while no other cohort runs.
    """

    def __init__(self, schedule: Schedule, cohorts: int, rooms: int, lifetime: int) -> None:
        self._continuous = schedule is Schedule.CONTINUOUS
        self._waiting = list(range(cohorts))[::-1]
        self._rooms = rooms
        self._lifetimes = [lifetime]  # passes: as planned, then as seen
        self._credit = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether no cohort is waiting."""
        return not self._waiting

    def admit(self, free: Sequence[int]) -> list[tuple[int, int]]:
        """(cohort, room) pairs that start with the next pass, given the free rooms."""
        if not self._continuous:
            count = self._rooms if len(free) == self._rooms else 0
        else:
            self._credit = min(self._credit + self._pace, float(self._rooms))
            count = int(self._credit + 1e-9)
            if len(free) == self._rooms:
                count = max(count, 1)
            count = min(count, len(free))
            self._credit -= min(count, self._credit)
        rooms = sorted(free)[:count]
        return [(self._waiting.pop(), room) for room in rooms if self._waiting]

    def ended(self, passes: int) -> None:
        """A cohort has left after this many passes."""
        self._lifetimes.append(passes)

    @property
    def _pace(self) -> float:
        """Cohorts per pass that keep all rooms in use: rooms over the passes a cohort lately lived."""
        recent = self._lifetimes[-self._rooms :]
        return self._rooms * len(recent) / sum(recent)
