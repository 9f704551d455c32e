"""What every lane did and when: the steps of one job, in the order they ran."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

# kind, unit, micro_batch_index, part, token, begin, end, bytes, flops. Packed, a step takes 45 bytes; as objects it
# would take ten times that, of the memory that the job itself needs.
ROW = struct.Struct("=BhihiddqQ")


class Slice(NamedTuple):
    """One step that ran. unit, micro_batch_index, part and token are those of the step (``schedule/steps.py``).

    begin_s, end_s: seconds since the job began, on one clock for all lanes. bytes: moved over the lane's link.
    """

    kind: str
    unit: int
    micro_batch_index: int
    part: int
    token: int
    begin_s: float
    end_s: float
    bytes: int
    flops: int

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s


@dataclass(frozen=True)
class LaneTimeline:
    """The steps of one lane.

    packed: rows of ``ROW``, kinds as places in ``kinds``, times on the clock on which the job began at ``origin_s``.
    bytes_per_s: the bandwidth to which an emulated link was throttled. dropped: steps that ran and are not kept.
    """

    packed: bytes | bytearray
    kinds: tuple[str, ...]
    origin_s: float = 0.0
    bytes_per_s: float | None = None
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.packed) // ROW.size

    def __iter__(self) -> Iterator[Slice]:
        origin = self.origin_s
        for kind, unit, batch, part, token, begin, end, count, flops in ROW.iter_unpack(self.packed):
            yield Slice(self.kinds[kind], unit, batch, part, token, begin - origin, end - origin, count, flops)


@dataclass(frozen=True)
class Timeline:
    """All lanes of one job, by name. An empty one belongs to a job that ran nothing."""

    lanes: Mapping[str, LaneTimeline] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        """Steps that ran and are not kept, over all lanes."""
        return sum(lane.dropped for lane in self.lanes.values())
