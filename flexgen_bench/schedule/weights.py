"""The endless stream of weight loads that runs ahead of the passes, and where a unit's weights are found."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from flexgen_bench.core.tiers import Site
from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.micro_batch import MicroBatch
from flexgen_bench.schedule.scheduled_job import ScheduledJob, Unit, UnitKind
from flexgen_bench.schedule.steps import Step, StepKind


@dataclass
class _Demand:
    """Of experts that are loaded on demand, in the present pass: loads so far, and the rows that these were for."""

    loads: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Blob:
    """A unit's weights where it is computed. weight_buffer: staging buffer (-1: in place); dequantized_buffer: that of
    the unpacked weights (-1: used as they are)."""

    buffers: tuple[Buffer, ...]
    weight_buffer: int
    dequantized_buffer: int = -1


class WeightStream:
    """Emits load steps for streamed units, in order, cyclically over the passes, as many as there are buffers.

    A load is emitted once everything that uses the unit whose buffer it takes has been, so the derived write-after-read
    dependency is the back-pressure. It does not stop at the end of a pass: while the head computes, the first layers of
    the next pass are already on their way.

    Experts that are loaded on demand are not part of it: of these, ``load_touched`` emits what each micro-batch needs.
    """

    def __init__(self, job: ScheduledJob) -> None:
        self._job = job
        self._order = _spread(job)
        self._loads = 0  # emitted so far, over all passes
        self._held = dict.fromkeys(UnitKind, 0)  # of these, those whose buffers are not free again
        self._end = 0  # of the loads, where the present pass ends
        self._is_last = False
        self._used: dict[tuple[Site, UnitKind], int] = {}  # loads into the buffers of a site and kind
        self._place: dict[tuple[Site, int], int] = {}  # (site, unit) -> buffer of its latest load
        self._buffers: dict[int, deque[int]] = {u.index: deque() for u in job.streamed}
        self._demands: dict[int, _Demand] = {}  # unit -> what was loaded of it in the present pass
        self._unpacked = 0
        self._is_narrow = False
        self._dequantized: dict[int, int] = {}  # unit -> buffer of the present pass

    def begin_pass(self, is_last: bool, most_rows: int) -> None:
        """Announce a pass. ``is_last``: nothing is loaded for a pass after it. most_rows: of its micro-batches."""
        self._is_narrow = most_rows <= self._job.packed_rows
        self._end += len(self._order)
        self._is_last = is_last
        self._dequantized.clear()
        self._demands.clear()

    def ready(self, unit: Unit) -> Iterator[Step]:
        """The steps to emit before the first use of ``unit`` in this pass."""
        yield from self._fill()
        if unit.unpack and not self._is_narrow and unit.index not in self._dequantized:
            target = self._dequantized[unit.index] = self._unpacked % self._job.dequantized_buffers
            self._unpacked += 1
            packed, buffer = self._packed(unit)
            yield Step(
                unit.site.lane,
                StepKind.DEQUANTIZE,
                unit.index,
                weight_buffer=buffer,
                dequantized_buffer=target,
                reads=packed,
                writes=(Buffer("dequantized", target),),
            )

    def where(self, unit: Unit) -> Blob:
        """Where the unit's weights are, in this pass, once ``ready`` has been emitted."""
        packed, buffer = self._packed(unit)
        if unit.index in self._dequantized:
            target = self._dequantized[unit.index]
            return Blob((*packed, Buffer("dequantized", target)), buffer, target)
        return Blob(packed, buffer)

    def load_touched(self, unit: Unit, micro_batch: MicroBatch, routed: Buffer) -> Iterator[Step]:
        """The steps that bring those of a unit's experts to its site that a micro-batch is ``routed`` to, and that
        none before it was in this pass. Each expert has its own place in the staging buffer."""
        demand = self._demands.setdefault(unit.index, _Demand())
        if not demand.loads:
            for site in unit.path:
                self._place[site, unit.index] = self._next_buffer(site, unit.kind)
        before, after = unit.touched(demand.rows), unit.touched(demand.rows + micro_batch.rows)
        number, demand.loads, demand.rows = demand.loads, demand.loads + 1, demand.rows + micro_batch.rows
        source: tuple[Buffer, ...] = (Buffer("resident", unit.index),)
        for site in unit.path:
            target = self._touched(unit, site)
            yield Step(
                site.h2d_weights if site.is_accelerator else site.disk_read,
                StepKind.LOAD_EXPERTS,
                unit.index,
                micro_batch,
                number,
                weight_buffer=self._place[site, unit.index],
                reads=(*source, routed),
                writes=target[-1:],
                bytes=round((after - before) * unit.expert_bytes),
            )
            source = target

    def _touched(self, unit: Unit, site: Site) -> tuple[Buffer, ...]:
        """What was loaded of a unit's experts on a site, one buffer for each load. Whoever uses one of them names all,
        so that the first load of the next unit waits for it."""
        name, buffer = f"weights.{site.name}", self._place[site, unit.index]
        return tuple(Buffer(name, buffer, part=number) for number in range(self._demands[unit.index].loads))

    def done(self, unit: Unit) -> Iterator[Step]:
        """The steps to emit after the last use of ``unit`` in this pass: the load that may take its buffer."""
        if unit.index in self._buffers:
            self._buffers[unit.index].popleft()
            self._held[unit.kind] -= 1
            yield from self._fill()

    def _packed(self, unit: Unit) -> tuple[tuple[Buffer, ...], int]:
        if unit.index in self._demands:
            return self._touched(unit, unit.site), self._place[unit.site, unit.index]
        if unit.index not in self._buffers:
            return (Buffer("resident", unit.index),), -1
        buffer, count = self._buffers[unit.index][0], len(self._job.pieces(unit))
        name = f"weights.{unit.site.name}"
        return tuple(Buffer(name, buffer, part=piece) for piece in range(count)), buffer

    def _fill(self) -> Iterator[Step]:
        if not self._order:
            return
        # At most one pass ahead: whether there is one after that is not known yet.
        last = self._end + (0 if self._is_last else len(self._order))
        while self._loads < last:
            unit, piece = self._order[self._loads % len(self._order)]
            if piece == 0:
                if self._held[unit.kind] == self._job.buffers_for(unit.kind):
                    return
                self._held[unit.kind] += 1
                for site in unit.path:
                    self._place[site, unit.index] = self._next_buffer(site, unit.kind)
                self._buffers[unit.index].append(self._place[unit.site, unit.index])
            self._loads += 1
            yield from self._load(unit, piece)

    def _load(self, unit: Unit, piece: int) -> Iterator[Step]:
        """From one site to the next, up to where the unit is computed."""
        source = Buffer("resident", unit.index)
        pieces = self._job.pieces(unit)
        start, stop = pieces[piece]
        for site in unit.path:
            buffer = self._place[site, unit.index]
            target = Buffer(f"weights.{site.name}", buffer, part=piece)
            yield Step(
                site.h2d_weights if site.is_accelerator else site.disk_read,
                StepKind.LOAD_WEIGHTS,
                unit.index,
                part=piece if len(pieces) > 1 else -1,
                weight_buffer=buffer,
                reads=(source,),
                writes=(target,),
                bytes=stop - start,
            )
            source = target

    def _next_buffer(self, site: Site, kind: UnitKind) -> int:
        """The buffers of a kind are used in turn."""
        used = self._used.get((site, kind), 0)
        self._used[site, kind] = used + 1
        first = next(i for i, buffer in enumerate(self._job.buffers[site]) if buffer.kind is kind)
        return first + used % self._job.buffers_for(kind)


def _spread(job: ScheduledJob) -> list[tuple[Unit, int]]:
    """(unit, piece) in the order in which a pass loads them: pieces of one unit evenly among the units before it."""
    order: list[tuple[Unit, int]] = []
    for unit in job.streamed:
        count, before = len(job.pieces(unit)), len(order)
        for piece in range(count):
            # Into the middle of its share of the units before; the earlier pieces have moved that back by ``piece``. A
            # unit in one piece stays in its place.
            place = before * (2 * piece + 1) // (2 * count) + piece if count > 1 else before
            order.insert(place, (unit, piece))
    return order
