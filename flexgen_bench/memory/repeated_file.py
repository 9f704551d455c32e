"""A packed file in which some extents repeat others: their bytes are on the disk once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from flexgen_bench.memory.direct_file import Arrived, DirectFile


@dataclass(frozen=True)
class Repeat:
    """Bytes ``start`` to ``stop`` of the file are those from ``source`` on. All page-aligned."""

    start: int
    stop: int
    source: int


class RepeatedFile(DirectFile):
    """Reads as if every extent were there; where one repeats another, the file has a hole."""

    def __init__(self, path: Path, repeats: Sequence[Repeat]) -> None:
        super().__init__(path)
        self._repeats = sorted(repeats, key=lambda repeat: repeat.start)

    def read(self, offset: int, into: Tensor, arrived: Arrived = lambda count: None) -> None:
        stop = offset + into.numel()

        def part(first: int, last: int, there: int) -> None:
            base = first - offset
            super(RepeatedFile, self).read(there, into[base : last - offset], lambda count: arrived(base + count))

        cursor = offset
        for repeat in self._repeats:
            first, last = max(cursor, repeat.start), min(stop, repeat.stop)
            if first < last:
                if cursor < first:
                    part(cursor, first, cursor)
                part(first, last, repeat.source + first - repeat.start)
                cursor = last
        if cursor < stop:
            part(cursor, stop, cursor)
