"""Dependencies, derived in one place from what steps read and write."""

from __future__ import annotations

from flexgen_bench.core.tiers import Lane
from flexgen_bench.schedule.steps import Buffer, Step

# Which step of which lane must be done first. Lanes work in order, so one number per lane says it all:
# "lane X has finished its n-th step" implies all its earlier ones.
Ticket = tuple[Lane, int]
Dependencies = dict[Lane, int]


class DependencyTracker:
    """Numbers steps per lane and finds what each one must wait for.

    A step waits for the last writer of everything it reads (read-after-write), and for the last writer
    (write-after-write) and all readers since (write-after-read) of everything it writes. Program order is
    the order of calls to ``add``.
    """

    def __init__(self) -> None:
        self._count: dict[Lane, int] = {}
        self._writer: dict[Buffer, Ticket] = {}
        self._readers: dict[Buffer, Dependencies] = {}

    def add(self, step: Step) -> tuple[int, Dependencies]:
        """The step's number on its lane (from 1), and per other lane the number it waits for."""
        lane = step.lane
        number = self._count[lane] = self._count.get(lane, 0) + 1
        waits: Dependencies = {}
        for buffer in step.reads:
            self._wait_for_writer(buffer, waits)
            self._readers.setdefault(buffer, {})[lane] = number
        for buffer in step.writes:
            self._wait_for_writer(buffer, waits)
            for reader, n in self._readers.pop(buffer, {}).items():
                if n > waits.get(reader, 0):
                    waits[reader] = n
            self._writer[buffer] = (lane, number)
        waits.pop(lane, None)  # the lane's own order already guarantees it
        return number, waits

    def _wait_for_writer(self, buffer: Buffer, waits: Dependencies) -> None:
        writer = self._writer.get(buffer)
        if writer is not None and writer[1] > waits.get(writer[0], 0):
            waits[writer[0]] = writer[1]
