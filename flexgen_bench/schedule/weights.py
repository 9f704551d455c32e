"""The endless stream of weight loads that runs ahead of the passes, and where a unit's weights are found."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.schedule.job import Job, Unit, UnitKind
from flexgen_bench.schedule.steps import Buffer, Step, StepKind


@dataclass(frozen=True)
class Blob:
    """A unit's weights where it is computed. slot: staging slot (-1: in place); plain: slot of the unpacked weights
    (-1: used as they are)."""

    buffers: tuple[Buffer, ...]
    slot: int
    plain: int = -1


class WeightStream:
    """Emits load steps for streamed units, in order, cyclically over the passes, as many as there are slots.

    A load is emitted once everything that uses the unit whose slot it takes has been, so the derived write-after-read
    dependency is the back-pressure. It does not stop at the end of a pass: while the head computes, the first layers of the next
    pass are already on their way.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._loads = 0  # emitted so far, over all passes
        self._held = dict.fromkeys(UnitKind, 0)  # of these, those whose slots are not free again
        self._end = 0  # loads up to the end of the present pass
        self._is_last = False
        self._used: dict[tuple[Tier, UnitKind], int] = {}  # loads into the slots of a tier and kind
        self._slots: dict[int, deque[int]] = {u.index: deque() for u in job.streamed}
        self._unpacked = 0
        self._plain: dict[int, int] = {}  # unit -> plain slot of the present pass

    def begin_pass(self, is_last: bool) -> None:
        """Announce a pass. ``is_last``: nothing is loaded for a pass after it."""
        self._end += len(self._job.streamed)
        self._is_last = is_last
        self._plain.clear()

    def ready(self, unit: Unit) -> Iterator[Step]:
        """The steps to emit before the first use of ``unit`` in this pass."""
        yield from self._fill()
        if unit.unpack and unit.index not in self._plain:
            plain = self._plain[unit.index] = self._unpacked % self._job.plain_slots
            self._unpacked += 1
            packed, slot = self._packed(unit)
            yield Step(
                unit.site.lane, StepKind.DEQUANTIZE, unit.index, slot=slot, plain=plain,
                reads=(packed,), writes=(Buffer("plain", plain),),
            )  # fmt: skip

    def where(self, unit: Unit) -> Blob:
        """Where the unit's weights are, in this pass, once ``ready`` has been emitted."""
        packed, slot = self._packed(unit)
        if unit.index in self._plain:
            plain = self._plain[unit.index]
            return Blob((packed, Buffer("plain", plain)), slot, plain)
        return Blob((packed,), slot)

    def done(self, unit: Unit) -> Iterator[Step]:
        """The steps to emit after the last use of ``unit`` in this pass: the load that may take its slot."""
        if unit.index in self._slots:
            self._slots[unit.index].popleft()
            self._held[unit.kind] -= 1
            yield from self._fill()

    def _packed(self, unit: Unit) -> tuple[Buffer, int]:
        if unit.index not in self._slots:
            return Buffer("resident", unit.index), -1
        slot = self._slots[unit.index][0]
        return Buffer(f"weights.{unit.site.tier}", slot), slot

    def _fill(self) -> Iterator[Step]:
        streamed = self._job.streamed
        if not streamed:
            return
        # At most one pass ahead: whether there is one after that is not known yet.
        last = self._end + (0 if self._is_last else len(streamed))
        while self._loads < last:
            unit = streamed[self._loads % len(streamed)]
            if self._held[unit.kind] == self._job.slots_for(unit.kind):
                return
            self._held[unit.kind] += 1
            self._loads += 1
            yield from self._load(unit)

    def _load(self, unit: Unit) -> Iterator[Step]:
        """One tier after the other, up to where the unit is computed."""
        source = Buffer("resident", unit.index)
        for tier in unit.path:
            slot = self._next_slot(tier, unit.kind)
            target = Buffer(f"weights.{tier}", slot)
            yield Step(
                Lane.DISK_READ if tier is Tier.CPU else Lane.H2D, StepKind.LOAD_WEIGHTS, unit.index,
                slot=slot, reads=(source,), writes=(target,), bytes=unit.load_bytes,
            )  # fmt: skip
            source = target
        self._slots[unit.index].append(slot)

    def _next_slot(self, tier: Tier, kind: UnitKind) -> int:
        """The slots of a kind are used in turn."""
        used = self._used.get((tier, kind), 0)
        self._used[tier, kind] = used + 1
        first = next(i for i, slot in enumerate(self._job.slots[tier]) if slot.kind is kind)
        return first + used % self._job.slots_for(kind)
