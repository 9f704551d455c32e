"""A model's weights in their places: resident blobs, staging buffers, embedding tables read by row.

Compressed weights are held, staged and loaded compressed. They are used in one of two ways: as they are, by kernels
that unpack a tile at a time (``QuantizedWeight``), or unpacked once per pass into a dequantized buffer by a DEQUANTIZE
step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from flexgen_bench.core.model import DType
from flexgen_bench.core.tiers import LaneKind, Tier
from flexgen_bench.core.units import MIB, PAGE, aligned
from flexgen_bench.engine.arenas import Arenas
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.sinks import Sinks
from flexgen_bench.engine.table_rows import rows_in_memory, rows_on_disk
from flexgen_bench.engine.verification import Verification
from flexgen_bench.engine.weight_views import Weight, plain_views, unpack, view, views
from flexgen_bench.memory.checksum import checksum
from flexgen_bench.memory.host import allocate
from flexgen_bench.memory.weight_store import TORCH_DTYPES, WeightStore
from flexgen_bench.models.packing import PackedEntry, PackedModel
from flexgen_bench.schedule.scheduled_job import ScheduledJob, UnitKind
from flexgen_bench.schedule.steps import Step

# Bytes that a load copies at once: a transfer of the other lane on the link gets in between two of them, after 3 ms at
# 12 GB/s.
CHUNK = 32 * MIB


class Weights:
    """Holds every unit on its tier and serves the steps that load, gather and use them."""

    def __init__(
        self,
        store: WeightStore,
        packed: PackedModel,
        dtype: DType,
        job: ScheduledJob,
        device: Device,
        arenas: Arenas,
        activations: int | None = None,
    ) -> None:
        """job: where its units live and are computed, and how many slots there are. activations: see ``Lossy``."""
        self._activations = activations
        self._packed = packed
        self._dtype = TORCH_DTYPES[dtype]
        self._job = job
        self._tiers = [unit.tier for unit in job.units]
        self._arenas = arenas
        self._verification = Verification(store)
        self._file = store.open()
        self._resident: dict[int, tuple[Tensor, int]] = {}  # unit -> (memory, its file offset)
        self.direct_io = self._file.direct
        self._slots: dict[Tier, list[Tensor]] = {}
        self._dequantized_buffers: list[Tensor] = []
        self._views: dict[tuple[int, int, Tier], Mapping[str, Weight]] = {}
        # By site and staging buffer: which of a unit's experts it holds, and which are to be loaded next.
        self._held: dict[tuple[Tier, int], set[int]] = {}
        self._due: dict[tuple[Tier, int], list[int]] = {}
        self._plain_views: dict[tuple[int, int], Mapping[str, Weight]] = {}
        try:
            self._load_resident()
            for site, buffers in job.buffers.items():
                self._slots[site.tier] = [arenas.allocate(site.tier, "weight slots", one.bytes) for one in buffers]
            unpacked = job.dequantized_buffer_bytes
            self._dequantized_buffers += [
                arenas.allocate(job.compute_tier, "unpacked weights", unpacked) for _ in range(job.dequantized_buffers)
            ]
            self.sinks = Sinks(packed, job, self._read_tensor, arenas).of
            device.settle()
        except BaseException:
            self.close()
            raise

    def load(self, step: Step) -> None:
        """LOAD_WEIGHTS: disk -> slot, disk -> host slot, host -> slot."""
        start, stop = self._job.pieces(self._job.units[step.unit])[step.part]
        if step.lane.kind is LaneKind.DISK_READ:
            self._read_unit(step.unit, self._slots[Tier.CPU][step.weight_buffer], start, stop)
            return
        _copy(self._source(step), self._slots[Tier.GPU][step.weight_buffer], start, stop)

    def settled(self, step: Step, touched: Sequence[int]) -> Step:
        """LOAD_EXPERTS with the bytes that it really moves: those of the ``touched`` experts that its staging buffer
        does not hold yet. The first load into a buffer in a pass begins anew. Called by the lane that loads."""
        blocks = self._packed.units[step.unit].experts
        assert blocks is not None, "only experts are loaded on demand"
        buffer = self._buffer_of(step)
        held = self._held.setdefault(buffer, set())
        if step.part == 0:
            held.clear()
        due = self._due[buffer] = [expert for expert in touched if expert not in held]
        held.update(due)
        return step._replace(bytes=len(due) * blocks.num_bytes)

    def load_experts(self, step: Step) -> None:
        """LOAD_EXPERTS: those that ``settled`` has found, each to its place in the staging buffer."""
        buffer, unit = self._buffer_of(step), self._packed.units[step.unit]
        blocks = unit.experts
        assert blocks is not None, "only experts are loaded on demand"
        for expert in self._due.pop(buffer):
            start, stop = expert * blocks.num_bytes, (expert + 1) * blocks.num_bytes
            if step.lane.kind is LaneKind.DISK_READ:
                into, own = self._slots[Tier.CPU][step.weight_buffer][start:stop], unit.offset + start
                entries = [entry for entry in unit.entries if entry.tensor.expert == expert]
                self._file.read(own, into, self._verification.while_reading(entries, into, own))
            else:
                _copy(self._source(step), self._slots[Tier.GPU][step.weight_buffer], start, stop)

    def _buffer_of(self, step: Step) -> tuple[Tier, int]:
        return step.lane.ends[1], step.weight_buffer

    def _source(self, step: Step) -> Tensor:
        """A unit in host memory, on its way to an accelerator."""
        if self._tiers[step.unit] is Tier.DISK:
            return self._slots[Tier.CPU][step.reads[0].key]
        memory, base = self._resident[step.unit]
        return memory[self._packed.units[step.unit].offset - base :]

    def dequantize(self, step: Step) -> None:
        """DEQUANTIZE: all of the step's unit, from its slot or from where it lives, into the step's dequantized
        buffer."""
        unpack(self._packed_views(step), self._unpacked(step.unit, step.dequantized_buffer))

    def of(self, step: Step) -> Mapping[str, Weight]:
        """The tensors of the step's unit by name, where the unit is computed.

        In its dequantized buffer, if it names one: only plain tensors then, and what its checkpoint has packed. Else in
        place or in its slot, where compressed ones are compressed.
        """
        if step.dequantized_buffer >= 0:
            return self._unpacked(step.unit, step.dequantized_buffer)
        return self._packed_views(step)

    def rows(self, name: str, indices: Tensor, pinned: bool = False) -> Tensor:
        """Rows of an embedding table, from wherever it lies, unpacked: (N,) indices -> (N, E). pinned: best
        page-locked."""
        entry = next(t for t in self._packed.tables if t.tensor.spec.name == name)
        if self._tiers[0] is Tier.DISK:
            return rows_on_disk(self._file, entry, indices, self._dtype)
        memory, base = self._resident[0]
        return rows_in_memory(view(memory, entry, base, self._dtype), indices, pinned)

    def close(self) -> None:
        """Release the memory now; views that are still held elsewhere would keep it."""
        self._file.close()
        self._views.clear()
        self._plain_views.clear()
        self._resident.clear()
        self._slots.clear()
        self._dequantized_buffers.clear()

    def _load_resident(self) -> None:
        """Read every unit that lives in memory. The embedding brings its tables, and a tied head comes with it: where
        another rank has that, which reads the token table for itself, for the few bytes that are the head's alone."""
        units, head = self._packed.units, self._packed.head
        for unit, tier in zip(units, self._tiers, strict=True):
            if tier is Tier.DISK or unit.index in self._resident or not self._owns(unit.index):
                continue
            start, stop = unit.offset, unit.offset + unit.num_bytes
            if unit.kind is UnitKind.EMBED:
                last = head if self._packed.tied else unit
                tables = self._packed.tables[-1]
                stop = max(last.offset + last.num_bytes, tables.offset + tables.num_bytes)
                start = 0
            start, stop = (start // PAGE * PAGE, min(aligned(stop), self._packed.file_bytes))
            name = "experts" if unit.kind is UnitKind.EXPERTS else "weights"
            memory = self._arenas.allocate(tier, name, stop - start)
            on_host = allocate(stop - start) if memory.is_cuda else memory
            inside = [e for e in self._packed.entries if start <= e.offset < stop]
            check = self._verification.while_reading(inside, on_host, start)
            self._file.read(start, on_host[: stop - start], check)
            if memory.is_cuda:
                memory.copy_(on_host[: stop - start])
            self._resident[unit.index] = (memory, start)
            if unit.kind is UnitKind.EMBED and self._packed.tied and self._owns(head.index):
                self._resident[head.index] = (memory, start)
        if self._tiers[0] is Tier.DISK and self._owns(0):
            self._verify_tables()

    def _owns(self, index: int) -> bool:
        return not self._job.units[index].elsewhere

    def _read_tensor(self, entry: PackedEntry) -> Tensor:
        """A plain tensor, from the file."""
        start = entry.offset // PAGE * PAGE
        window = allocate(aligned(entry.offset + entry.num_bytes - start))
        self._file.read(start, window)
        self._verification.check(entry, window, start)
        plain = view(window, entry, start, self._dtype)
        assert isinstance(plain, Tensor), entry
        return plain

    def _verify_tables(self) -> None:
        """Tables on disk are read by single rows later; check them as a whole now."""
        window = allocate(64 * MIB)
        for entry in self._packed.tables:
            if not self._verification.is_right(entry):
                sums = [self._checksum_on_disk(first, count, window) for first, count in entry.parts]
                self._verification.judge(entry, sums)

    def _checksum_on_disk(self, first: int, count: int, window: Tensor) -> int:
        """Of ``count`` bytes of the file, read through ``window``."""
        start, stop, sum_so_far = first // PAGE * PAGE, first + count, 0
        for offset in range(start, stop, window.numel()):
            size = min(window.numel(), aligned(stop - offset))
            self._file.read(offset, window[:size])
            part = window[max(first - offset, 0) : min(size, stop - offset)]
            sum_so_far = checksum(part.numpy().data, sum_so_far)
        return sum_so_far

    def _read_unit(self, index: int, into: Tensor, start: int, stop: int) -> None:
        """One piece of a unit. Its tensors are checked as soon as all of them is there."""
        unit = self._packed.units[index]
        check = self._verification.while_reading(unit.entries, into, unit.offset)
        whole = stop == unit.num_bytes  # pieces come in order
        self._file.read(unit.offset + start, into[start:stop], lambda count: check(start + count) if whole else None)

    def _packed_views(self, step: Step) -> Mapping[str, Weight]:
        site = self._job.units[step.unit].site.tier
        key = (step.unit, step.weight_buffer, site)
        if key not in self._views:
            self._views[key] = self._make_views(*key)
        return self._views[key]

    def _make_views(self, index: int, slot: int, site: Tier) -> Mapping[str, Weight]:
        unit = self._packed.units[index]
        if slot >= 0:
            memory, base = self._slots[site][slot], unit.offset
            return views(memory, unit, base, self._dtype, self._activations)
        if not unit.entries:
            return {}
        memory, base = self._resident[index]
        return views(memory, unit, base, self._dtype, self._activations)

    def _unpacked(self, index: int, buffer: int) -> Mapping[str, Weight]:
        key = (index, buffer)
        if key not in self._plain_views:
            unit = self._packed.units[index]
            self._plain_views[key] = plain_views(self._dequantized_buffers[buffer], unit, self._dtype)
        return self._plain_views[key]


def _copy(source: Tensor, target: Tensor, start: int, stop: int) -> None:
    """Bytes of a unit to the same place in a staging buffer, in chunks."""
    for first in range(start, stop, CHUNK):
        last = min(first + CHUNK, stop)
        target[first:last].copy_(source[first:last], non_blocking=True)
