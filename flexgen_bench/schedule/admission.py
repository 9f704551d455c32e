"""Who starts with the next pass: the sequence groups of a closed job as its schedule says, or the requests of an open
one as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from flexgen_bench.core.policy import Schedule
from flexgen_bench.schedule.sequence_group import SequenceGroup
from flexgen_bench.schedule.sequence_groups import Request, SequenceGroups


class Admission(Protocol):
    """Decides before each pass which waiting sequences move into which free KV slots."""

    @property
    def is_empty(self) -> bool:
        """Whether nobody is waiting."""

    @property
    def is_over(self) -> bool:
        """Whether nobody is waiting and nobody can come any more."""

    @property
    def waiting(self) -> int:
        """Sequences that have not started."""

    def admit(self, free: Sequence[int]) -> list[SequenceGroup]:
        """The sequence groups that start with the next pass, given the free KV slots; each says which it takes."""

    def ended(self, passes: int) -> None:
        """A sequence group has left after this many passes."""


class ClosedAdmission:
    """All requests are known.

    Block: when every KV slot is free, all of them are filled. Continuous: sequence groups start evenly spread over the
    passes a sequence group lives, so that every pass has its share of prefill (compute-bound) beside decode
    (link-bound) and neither waits for the other; a job's first sequence group starts at once, and nothing waits while
    no other sequence group runs. wave: whose groups and KV slots these are.
    """

    def __init__(self, schedule: Schedule, groups: SequenceGroups, wave: int = 0) -> None:
        self._continuous = schedule is Schedule.CONTINUOUS
        self._groups = groups
        self._waiting = list(groups.members_of(wave))[::-1]
        self._kv_slots = len(groups.slots_of(wave))
        self._lifetimes = [groups.lifetime]  # passes: as planned, then as seen
        self._credit = 0.0

    @property
    def is_empty(self) -> bool:
        return not self._waiting

    @property
    def is_over(self) -> bool:
        return not self._waiting

    @property
    def waiting(self) -> int:
        return sum(len(self._groups.members[index]) for index in self._waiting)

    def admit(self, free: Sequence[int]) -> list[SequenceGroup]:
        if not self._continuous:
            count = self._kv_slots if len(free) == self._kv_slots else 0
        else:
            self._credit = min(self._credit + self._pace, float(self._kv_slots))
            count = int(self._credit + 1e-9)
            if len(free) == self._kv_slots:
                count = max(count, 1)
            count = min(count, len(free))
            self._credit -= min(count, self._credit)
        groups = self._groups
        return [
            groups.start(self._waiting.pop(), groups.kv_slots[kv_slot])
            for kv_slot in sorted(free)[:count]
            if self._waiting
        ]

    def ended(self, passes: int) -> None:
        self._lifetimes.append(passes)

    @property
    def _pace(self) -> float:
        """Sequence groups per pass that keep all KV slots in use: KV slots over the passes a sequence group lately
        lived."""
        recent = self._lifetimes[-self._kv_slots :]
        return self._kv_slots * len(recent) / sum(recent)


class OpenAdmission:
    """Requests come while the job runs. Each starts as soon as there is a free KV slot, first come, first served; a KV
    slot holds one sequence (``Capacity``), so it is free again when that one ends.

    sequence groups: of a plan for a capacity. Not for several threads at once.
    """

    def __init__(self, groups: SequenceGroups) -> None:
        self._groups = groups
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

    def admit(self, free: Sequence[int]) -> list[SequenceGroup]:
        groups = self._groups
        return [
            groups.start_request(*self._waiting.popleft(), groups.kv_slots[kv_slot])
            for kv_slot in sorted(free)
            if self._waiting
        ]

    def ended(self, passes: int) -> None:
        pass
