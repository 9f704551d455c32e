"""The KV cache of a job: KV slots on every tier, staging, and where each step reads and writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flexgen_bench.core.tiers import LaneKind, Tier
from flexgen_bench.engine.arenas import Arenas
from flexgen_bench.engine.device import Device, crossing
from flexgen_bench.engine.kv_rooms import Home, KVRooms
from flexgen_bench.kernels.attention import Padding
from flexgen_bench.memory.kv_cache import KVForm, KVRegion, Segment, Stored
from flexgen_bench.memory.kv_disk_ring import DiskRingRegion
from flexgen_bench.memory.kv_ring import RingRegion
from flexgen_bench.memory.spill import SpillFile
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.schedule.kv_disk_ring import DiskRing
from flexgen_bench.schedule.kv_layout import KVLayout
from flexgen_bench.schedule.micro_batch import Part
from flexgen_bench.schedule.scheduled_job import UnitKind
from flexgen_bench.schedule.sequence_group import SequenceGroup
from flexgen_bench.schedule.steps import Step


class KVCache:
    """Keys and values of all KV slots of a job, and their staging buffers, allocated from its plan."""

    def __init__(self, plan: MemoryPlan, form: KVForm, device: Device, arenas: Arenas, spill: SpillFile | None) -> None:
        self._job = plan.job
        self._form = form
        self._device = device
        self._spill = spill
        rooms = KVRooms(plan, arenas)
        self._memory, self._stacks, self._offset, self._tails = rooms.memory, rooms.stacks, rooms.offset, rooms.tails
        self._prompts, self._prompts_host = rooms.prompts, rooms.prompts_host
        self._slots, self._host_slots = rooms.slots, rooms.host_slots
        self.spilled = rooms.spilled  # bytes of the spill file in use
        # One token's K and V, by (staging buffer, part): made by attention, on its way home.
        self._new: dict[tuple[int, int], list[Stored]] = {}
        self._new_host: dict[tuple[int, int], list[Stored]] = {}
        self._regions: dict[tuple[int, int, int | None], KVRegion] = {}  # by sequence group, span and ring
        # By the same and the device; of rings, with the token that they are of.
        self._paddings: dict[tuple[int, int, int | None, torch.device], tuple[int, Padding | None]] = {}

    # Prefill

    def keep_prompt(self, step: Step, part: Part, kv: Sequence[Stored]) -> None:
        """Lay stored keys and values (rows of the micro-batch, G, ...) of a part's prompts or a chunk of them out per
        sequence, at home or on the way. Every sequence gets those of the tokens that all share."""
        raw = self._prompt_bytes(step, part)
        region, member = self._region(step, part), part.member
        if isinstance(region, DiskRingRegion):
            self._keep_by_distance(region, raw, part, kv)
            return
        rows = [tuple(t[part.row : part.stop] for t in stored) for stored in kv]
        ranges = member.ranges[part.span.start : part.span.stop]
        if member.shared_rows:
            same = [tuple(t[: member.shared_rows] for t in stored) for stored in kv]
            region.put_shared(raw, member.start, same)
        if (
            len(set(ranges)) == 1
            and part.span.count == region.layout.sequences
            and (
                ranges[0][1] < member.group.prompt_lens[part.span.start]
                or ranges[0][1] >= region.layout.filled_by_prompts
            )
        ):
            region.put_prompts(raw, ranges[0][0], rows)
            return
        cursor = 0
        for place, (first, last) in enumerate(ranges, start=part.span.start):
            count = last - first
            if count:
                own = [tuple(t[cursor : cursor + count] for t in stored) for stored in rows]
                slot, length = part.group.places[place], part.group.prompt_lens[place]
                region.put_prompt(raw, slot, first, own, length)
            cursor += count

    def _keep_by_distance(self, region: DiskRingRegion, raw: Tensor, part: Part, kv: Sequence[Stored]) -> None:
        """The same where prompts lie from their ends on: one by one."""
        member, group = part.member, part.member.group
        for place in range(part.span.start, part.span.stop):
            slot, length = group.places[place], group.prompt_lens[place]
            if place and member.shared_rows:  # the first has them among its own
                same = [tuple(t[: member.shared_rows] for t in stored) for stored in kv]
                region.put_prompt(raw, slot, member.start, same, length)
            row, stop = (part.row + member.offsets[i] - member.offsets[part.span.start] for i in (place, place + 1))
            if row < stop:
                own = [tuple(t[row:stop] for t in stored) for stored in kv]
                region.put_prompt(raw, slot, member.ranges[place][0], own, length)

    def prompt_so_far(self, step: Step, part: Part, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values (S, G, stop, D) of a part's prompts up to ``stop``, as attention sees them."""
        stored = self._region(step, part).prompt(self._prompt_bytes(step, part))
        both = self._form.decode(tuple(t[:, :, :, :stop] for t in stored))
        return both[0], both[1]

    def before(self, step: Step, part: Part, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Of a ring: keys and values (S, G, last - first, D) of a part's prompts at these positions, which the chunk
        that is to be kept next has not overwritten."""
        region, raw = self._region(step, part), self._prompt_bytes(step, part)
        if isinstance(region, DiskRingRegion):
            group = part.member.group
            lens = group.prompt_lens[part.span.start : part.span.stop]
            # Prompts that have ended are not asked for: anything in their place.
            each = [region.recent(raw, i, first, last, max(n, last)) for i, n in enumerate(lens)]
            found = tuple(torch.stack(parts, dim=1) for parts in zip(*each, strict=True))
        else:
            assert isinstance(region, RingRegion)
            found = region.recent(raw, first, last)
        both = self._form.decode(found)
        return both[0], both[1]

    def ring(self, step: Step, part: Part) -> int | None:
        """The window, if a part's cache keeps no other tokens of this step's layer; None if it keeps all."""
        ring = self._job.units[step.unit].ring
        return None if ring is None else part.layout(ring).ring

    def _prompt_bytes(self, step: Step, part: Part) -> Tensor:
        """Where the prompt gathers: its home if that is where the layer is computed, else a staging buffer."""
        unit = self._job.units[step.unit]
        if self._job.keep_kv and self._job.kv_tier(unit, part) is unit.site.tier:
            return self._memory[_home(step, part)]
        return self._slice(self._prompts[unit.site.tier][step.micro_batch.prompt_buffer], step, part)

    def _slice(self, staging: Tensor, step: Step, part: Part) -> Tensor:
        """The part's share of a staging buffer: parts that are staged lie one after the other."""
        unit, start = self._job.units[step.unit], 0
        for other in step.micro_batch.kv_parts[: part.index]:
            if not (self._job.keep_kv and self._job.kv_tier(unit, other) is unit.site.tier):
                start += self._region(step, other).layout.prompt_bytes
        return staging[start:]

    # Steps that move

    def store(self, step: Step) -> None:
        """STORE_KV: prompt or finished segment to disk, prompt or token from the accelerator to the host."""
        part = _part(step)
        layout, to_disk = self._region(step, part).layout, part.tier is Tier.DISK
        home = _home(step, part)
        if part.token:
            if step.lane.kind is LaneKind.DISK_WRITE:
                segment = layout.full_segments(part.token) - 1
                offset = self._offset[home] + layout.segment_offset(segment)
                self._file.write(offset, self._tails[home][: layout.segment_bytes])
            else:
                key = (step.buffer_index, step.part)
                # Keys and values in one copy.
                both = [torch.stack([crossing(t) for t in pair]) for pair in zip(*self._new[key], strict=True)]
                moved = [self._device.to_host(t).unbind(0) for t in both]
                self._new_host[key] = list(zip(*moved, strict=True))
            return
        size, from_accelerator = layout.prompt_bytes, self._job.units[step.unit].site.is_accelerator
        if step.lane.kind is LaneKind.DISK_WRITE:
            source = self._host_prompt(step, part) if from_accelerator else self._prompt_bytes(step, part)
            self._file.write(self._offset[home], source[:size])
            return
        target = self._host_prompt(step, part) if to_disk else self._memory[home]
        target[:size].copy_(self._prompt_bytes(step, part)[:size], non_blocking=True)

    def _host_prompt(self, step: Step, part: Part) -> Tensor:
        """Only parts on disk pass through here; each has its place after the ones before it."""
        before = (p for p in step.micro_batch.kv_parts[: part.index] if p.tier is Tier.DISK)
        start = sum(self._region(step, p).layout.prompt_bytes for p in before)
        return self._prompts_host[step.micro_batch.prompt_buffer][start:]

    def load(self, step: Step) -> None:
        """LOAD_KV: disk -> host slot, or host -> accelerator."""
        part = _part(step)
        layout, home = self._region(step, part).layout, _home(step, part)
        full, used = layout.full_segments(part.token - 1), layout.used_segments(part.token - 1)
        size = layout.prefix_bytes(full)
        if isinstance(layout, DiskRing):
            self._load_ring(step, part, layout)
            return
        if step.lane.kind is LaneKind.DISK_READ:
            self._file.read(self._offset[home], self._host_slots[part.kv_buffer][:size])
            return
        slot = self._slots[part.kv_buffer]
        if part.tier is Tier.DISK:
            slot[:size].copy_(self._host_slots[part.kv_buffer][:size], non_blocking=True)
            if used > full:
                tail = self._tails[home][: layout.segment_bytes]
                slot[size:][: layout.segment_bytes].copy_(tail, non_blocking=True)
        else:
            size = layout.moved_bytes(part.token)
            slot[:size].copy_(self._memory[home][:size], non_blocking=True)

    def _load_ring(self, step: Step, part: Part, layout: DiskRing) -> None:
        home, host = _home(step, part), self._host_slots[part.kv_buffer]
        for start, stop in layout.extents(part.token):
            if step.lane.kind is LaneKind.DISK_READ:
                self._file.read(self._offset[home] + start, host[start:stop])
            else:
                self._slots[part.kv_buffer][start:stop].copy_(host[start:stop], non_blocking=True)
        if step.lane.kind is not LaneKind.DISK_READ and (part.token - 1) % layout.segment_tokens:
            tail = self._tails[home][: layout.tail_bytes]
            self._slots[part.kv_buffer][layout.region_bytes :][: layout.tail_bytes].copy_(tail, non_blocking=True)

    def append(self, step: Step) -> None:
        """APPEND_KV: a token that came back from the accelerator, into the cache on the host."""
        part = _part(step)
        self._append_at_home(step, part, self._new_host[step.buffer_index, step.part])

    # Decode

    def attend_in_memory(self, step: Step, part: Part, new: Sequence[Stored]) -> list[Segment]:
        """Append one token's stored k, v (S', G, ...) to a cache in this device's memory; returns all of it."""
        self._append_at_home(step, part, new)
        region, home, token = self._region(step, part), _home(step, part), part.token
        if part.tier is not Tier.DISK:
            return region.segments(self._memory[home], token)
        if isinstance(region, DiskRingRegion):
            return region.window(self._host_slots[part.kv_buffer], self._tails[home], token)
        on_disk = region.layout.full_segments(token - 1) * region.layout.segment_tokens
        segments = region.segments(self._host_slots[part.kv_buffer], on_disk)
        tail = region.loose_tail(self._tails[home])
        return [*segments, region.first_tokens(tail, token - on_disk)]

    def attend_moved(self, step: Step, part: Part, new: Sequence[Stored]) -> list[Segment]:
        """The cache that was moved to the accelerator with the new token, which is also kept for its way home."""
        region, slot = self._region(step, part), self._slots[part.kv_buffer]
        self._new[step.buffer_index, step.part] = list(new)
        if isinstance(region, DiskRingRegion):
            tail = slot[region.layout.region_bytes :]
            region.append_loose(tail, part.token, slots_of(part), new)
            return region.window(slot, tail, part.token)
        if isinstance(region, RingRegion):
            region.append_at(slot, part.positions, part.token, slots_of(part), new)
        else:
            region.append(slot, part.token, slots_of(part), new)
        return region.segments(slot, part.token)

    def all_layers(self, part: Part, tier: Tier, ring: int | None = None) -> tuple[Stored, list[int]] | None:
        """A part's cache of all layers that have it on this tier and keep every token, or such a ring: each tensor (L,
        2, S, G, tokens, ...), and their units. None if it does not lie in one piece per layer."""
        layout = part.layout(ring)
        if not layout.is_joined:
            return None
        raw, units = self._stacks[part.member.group.kv_slot, part.home, tier, ring]
        return KVRegion(layout, self._form).whole(raw), units

    def is_moved(self, step: Step, part: Part) -> bool:
        """Whether this ATTEND reads a cache that was moved to an accelerator."""
        return step.lane.kind is LaneKind.GPU and part.tier is not Tier.GPU

    def live_slots(self, part: Part) -> Sequence[int] | None:
        """Which of the region's sequences are still running; None if all are."""
        slots = slots_of(part)
        return None if len(slots) == part.layout().sequences else slots

    def padding(self, part: Part, device: torch.device, ring: int | None = None) -> Padding | None:
        """Which slots of the prompts' segment hold a token, or of a ring (of the layers that have it); None if all
        do."""
        key, token = (part.member.group.index, part.home, ring, device), part.token if ring is not None else 0
        known, padding = self._paddings.get(key, (-1, None))
        if known != token and (known < 0 or padding is not None):  # a ring that is full stays so
            whole = part.member.group.whole
            span = whole.kv[part.home]
            lengths, layout = torch.tensor(whole.prompt_lens[span.start : span.stop]), part.layout(ring)
            if ring is None:
                padding = Padding.of(lengths, layout.prompt_tokens, torch.device("cpu"))
            else:
                filled = layout.filled(token)
                padding = Padding.of((lengths + token).clamp(max=filled), filled, torch.device("cpu"), of_all=True)
            if padding is not None and device.type == "cuda":  # without waiting for the device
                padding = replace(padding, mask=self._device.to_compute(padding.mask))
            self._paddings[key] = token, padding
        return padding

    def homes(self, group: SequenceGroup) -> Iterator[tuple[KVRegion, Tensor]]:
        """Of a group in one span that is kept in memory: its region and the bytes of it, layer after layer."""
        home = next(number for number, span in enumerate(group.kv) if span.count)
        for unit in self._job.units:
            if unit.kind is UnitKind.LAYER:
                region = self._made(group.laid_out(unit.ring)[home])
                yield region, self._memory[group.kv_slot, home, unit.index]

    def forget(self, group: SequenceGroup) -> None:
        """A sequence group has left its KV slot."""
        for region in [key for key in list(self._regions) if key[0] == group.index]:
            del self._regions[region]
        for padding in [key for key in list(self._paddings) if key[0] == group.index]:
            del self._paddings[padding]

    def _append_at_home(self, step: Step, part: Part, new: Sequence[Stored]) -> None:
        region, home = self._region(step, part), _home(step, part)
        if part.tier is Tier.DISK:
            region.append_loose(self._tails[home], part.token, slots_of(part), new)
        elif isinstance(region, RingRegion):
            region.append_at(self._memory[home], part.positions, part.token, slots_of(part), new)
        else:
            region.append(self._memory[home], part.token, slots_of(part), new)

    def _region(self, step: Step, part: Part) -> KVRegion:
        ring = self._job.units[step.unit].ring
        key = (part.member.group.index, part.home, ring)
        # Looked up once: a sequence group may be forgotten while its last segments are on their way to disk.
        region = self._regions.get(key)
        if region is None:
            region = self._regions[key] = self._made(part.layout(ring))
        return region

    def _made(self, layout: KVLayout) -> KVRegion:
        if isinstance(layout, DiskRing):
            return DiskRingRegion(layout, self._form)
        return (KVRegion if layout.ring is None else RingRegion)(layout, self._form)

    @property
    def _file(self) -> SpillFile:
        assert self._spill is not None, "a cache on disk has a spill file"
        return self._spill


def _part(step: Step) -> Part:
    return step.micro_batch.kv_parts[step.part]


def _home(step: Step, part: Part) -> Home:
    return part.member.group.kv_slot, part.home, step.unit


def slots_of(part: Part) -> Sequence[int]:
    """The places in their region of a part's sequences, which are still running."""
    return part.member.group.places[part.span.start : part.span.stop]
