"""Dependencies, derived in one place from what steps read and write."""

from __future__ import annotations

from collections import defaultdict

from flexgen_bench.core.tiers import Lane
from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.steps import Step

# Which step of which lane must be done first. Lanes work in order, so one number per lane says it all:
# "lane X has finished its n-th step" implies all its earlier ones.
Dependencies = dict[Lane, int]


class DependencyTracker:
    """Numbers steps per lane and finds what each one must wait for.

    A step waits for the last writer of everything it reads (read-after-write), and for the last writer
    (write-after-write) and all readers since (write-after-read) of everything it writes. Program order is
    the order of calls to ``add``.
    """

    def __init__(self) -> None:
        self._count: defaultdict[Lane, int] = defaultdict(int)
        self._used: dict[Buffer, _Use] = {}

    def add(self, step: Step) -> tuple[int, Dependencies]:
        """The step's number on its lane (from 1), and per other lane the number it waits for.

        Called for every step that is run or simulated, so each buffer is looked up once.
        """
        lane, used = step.lane, self._used
        number = self._count[lane] = self._count[lane] + 1
        waits: Dependencies = {}
        for buffer in step.reads:
            use = used.get(buffer)
            if use is None:
                use = used[buffer] = _Use()
            elif use.number > waits.get(use.writer, 0):
                waits[use.writer] = use.number
            use.readers[lane] = number
        for buffer in step.writes:
            use = used.get(buffer)
            if use is None:
                use = used[buffer] = _Use()
            else:
                if use.number > waits.get(use.writer, 0):
                    waits[use.writer] = use.number
                for reader, n in use.readers.items():
                    if n > waits.get(reader, 0):
                        waits[reader] = n
                use.readers.clear()
            use.writer, use.number = lane, number
        waits.pop(lane, None)  # the lane's own order already guarantees it
        return number, waits


class _Use:
    """Of a buffer: its last writer (lane, and the step's number on it; 0: nobody has written it), and who has read it
    since."""

    __slots__ = ("number", "readers", "writer")

    def __init__(self) -> None:
        self.writer, self.number = Lane.CPU, 0
        self.readers: Dependencies = {}
