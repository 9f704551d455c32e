"""Hidden states between units: at home on any tier, or staged where a unit is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen_bench.core.policy import Policy
from flexgen_bench.core.tiers import LaneKind, Tier
from flexgen_bench.core.units import aligned
from flexgen_bench.engine.arenas import Arenas
from flexgen_bench.engine.device import Device, crossing
from flexgen_bench.memory.spill import SpillFile
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.planner.staging import chunk_rows
from flexgen_bench.schedule.micro_batch import MicroBatch, Part
from flexgen_bench.schedule.passes import chunk_len
from flexgen_bench.schedule.steps import Step

Home = tuple[int, int, int]  # KV slot, chunk, span of the KV slot
Staged = tuple[Tier, int, int]  # site, staging buffer, part


class HiddenStates:
    """Hidden states (rows, hidden) of every KV slot, cut into spans by tier.

    Rows that live on the compute tier are kept as the tensors that compute steps made; rows on the host or on disk
    have a place of their own.
    """

    def __init__(
        self,
        plan: MemoryPlan,
        policy: Policy,
        dtype: torch.dtype,
        device: Device,
        arenas: Arenas,
        spill: SpillFile | None,
        spill_offset: int,
    ) -> None:
        self._job, self._policy = plan.job, policy
        self._sites = [unit.site.tier for unit in plan.job.units]
        self._dtype, self._device, self._spill = dtype, device, spill
        self._row_bytes = plan.job.hidden_row_bytes
        self._compute = plan.job.compute_tier
        self._waves = plan.groups.waves
        # Rows that live on the compute tier: of a whole micro-batch, by its place, or of its parts.
        self._whole: dict[tuple[int, int], Tensor] = {}
        self._rows: dict[Home, Tensor] = {}
        self._memory: dict[tuple[int, int], Tensor] = {}  # (KV slot, span) -> rows on the host
        self._offset: dict[tuple[int, int], int] = {}  # (KV slot, span) -> place in the spill file
        self._staged: dict[Staged, Tensor] = {}  # rows brought to a unit's site
        self._host: dict[Staged, Tensor] = {}  # rows between disk and an accelerator
        # (site, staging buffer) -> what the last compute step left
        self._current: dict[tuple[Tier, int], Tensor] = {}
        for kv_slot, sizes in zip(plan.groups.kv_slots, plan.kv_slots, strict=True):
            for number, (span, size) in enumerate(zip(kv_slot.hidden, sizes.hidden, strict=True)):
                if span.tier is plan.job.compute_tier:
                    arenas.note(span.tier, "activations", size)
                elif span.tier is Tier.DISK:
                    arenas.note(span.tier, "activations", size)
                    self._offset[kv_slot.index, number] = spill_offset
                    spill_offset += size
                else:
                    memory = arenas.allocate(span.tier, "activations", size)
                    self._memory[kv_slot.index, number] = memory
        num_buffers, pages = plan.staging.num_buffers + plan.staging.cpu_attention_buffers, plan.staging.pages
        self._pages = [arenas.allocate(Tier.CPU, "activation pages", pages) for _ in range(num_buffers if pages else 0)]

    def put(self, step: Step, x: Tensor) -> None:
        """A compute step has made new hidden states; parts that live at its site are home with this."""
        micro_batch, tier = step.micro_batch, self._sites[step.unit]
        if micro_batch.hidden_tier is tier is self._compute:
            self._whole[micro_batch.place] = x
            if self._rows:  # the old rows, where a link has brought them back
                for part in micro_batch.hidden_parts:
                    self._rows.pop(_home(micro_batch, part), None)
            return
        if any(part.tier is not tier for part in micro_batch.hidden_parts):
            # Only then has the step claimed the staging buffer: another micro-batch may still be using it.
            self._current[tier, step.buffer_index] = x
        for part in micro_batch.hidden_parts:
            if part.tier is not tier:
                continue
            rows = x[part.row : part.stop]
            if tier is self._compute:  # a view would keep the rows of the other parts, too
                self._rows[_home(micro_batch, part)] = rows.clone()
            else:
                self._in_memory(micro_batch, part).copy_(rows)

    def enter(self, step: Step, x: Tensor) -> None:
        """Hidden states of the rank before: where the next step of the same micro-batch and site takes them."""
        self.put(step, x)
        tier = self._site(step)
        for part in step.micro_batch.hidden_parts:
            if part.tier is not tier:
                self._staged[tier, step.buffer_index, part.index] = x[part.row : part.stop]

    def made(self, step: Step) -> Tensor:
        """All rows that a compute step has just left at the site of the step; none has gone home from there."""
        tier = self._site(step)
        if all(part.tier is tier for part in step.micro_batch.hidden_parts):
            return self.take(step)
        return self._current[tier, step.buffer_index]

    def take(self, step: Step) -> Tensor:
        """All rows of the micro-batch at the site of the step, in order."""
        micro_batch, tier = step.micro_batch, self._sites[step.unit]
        if micro_batch.hidden_tier is tier is self._compute and micro_batch.place in self._whole:
            return self._whole[micro_batch.place]
        parts = [self._part(step, micro_batch, part) for part in micro_batch.hidden_parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, step: Step, micro_batch: MicroBatch, part: Part) -> Tensor:
        tier = self._site(step)
        if part.tier is not tier:
            return crossing(self._staged.pop((tier, step.buffer_index, part.index)))
        if tier is self._compute:  # made by a compute step, or brought back by a link
            return crossing(self._at_compute(micro_batch, part))
        return self._in_memory(micro_batch, part)

    def _at_compute(self, micro_batch: MicroBatch, part: Part) -> Tensor:
        """A part's rows in their home on the compute tier."""
        whole = self._whole.get(micro_batch.place)
        return self._rows[_home(micro_batch, part)] if whole is None else whole[part.row : part.stop]

    def load(self, step: Step) -> None:
        """LOAD_HIDDEN: one tier nearer to the site."""
        micro_batch = step.micro_batch
        part, key = micro_batch.hidden_parts[step.part], (self._site(step), step.buffer_index, step.part)
        if step.lane.kind is LaneKind.DISK_READ:
            pages = self._paged(step, part)
            assert self._spill is not None
            self._spill.read(self._disk_offset(micro_batch, part), pages)
            at_site = self._site(step) is Tier.CPU
            (self._staged if at_site else self._host)[key] = self._as_rows(pages, part.rows)
        elif step.lane.kind is LaneKind.D2H:
            self._staged[key] = self._device.to_host(self._at_compute(micro_batch, part))
        else:
            on_disk = part.tier is Tier.DISK
            source = self._host.pop(key) if on_disk else self._in_memory(micro_batch, part)
            self._staged[key] = self._device.to_compute(source)

    def store(self, step: Step) -> None:
        """STORE_HIDDEN: one tier nearer to home."""
        micro_batch = step.micro_batch
        part = micro_batch.hidden_parts[step.part]
        if step.lane.kind is LaneKind.DISK_WRITE:
            pages = self._paged(step, part)
            if self._site(step) is Tier.CPU:
                rows = self._current[self._site(step), step.buffer_index][part.row : part.stop]
                self._as_rows(pages, part.rows).copy_(rows)
            assert self._spill is not None
            self._spill.write(self._disk_offset(micro_batch, part), pages)
            return
        rows = self._current[self._site(step), step.buffer_index][part.row : part.stop]
        if step.lane.kind is LaneKind.H2D:
            self._rows[_home(micro_batch, part)] = self._device.to_compute(rows)
            self._whole.pop(micro_batch.place, None)  # these are the old rows
            return
        on_disk = part.tier is Tier.DISK
        target = self._as_rows(self._paged(step, part), part.rows) if on_disk else self._in_memory(micro_batch, part)
        target.copy_(crossing(rows), non_blocking=True)

    def begin_pass(self, first: MicroBatch) -> None:
        """No hidden states outlive a pass: what the last one of the same wave left on the compute tier is released.
        Other waves may be under way on other lanes. first: a micro-batch of the pass."""
        wave = first.place[0] % self._waves
        for home in [one for one in list(self._rows) if one[0] % self._waves == wave]:
            del self._rows[home]
        for place in [one for one in list(self._whole) if one[0] % self._waves == wave]:
            del self._whole[place]

    def _site(self, step: Step) -> Tier:
        return self._sites[step.unit]

    def _in_memory(self, micro_batch: MicroBatch, part: Part) -> Tensor:
        """A part's rows in its home in host memory."""
        start = sum(self._chunks(part)[: micro_batch.chunk]) if micro_batch.chunk else 0
        memory = self._memory[part.group.kv_slot, part.home][start * self._row_bytes :]
        return self._as_rows(memory, part.rows)

    def _disk_offset(self, micro_batch: MicroBatch, part: Part) -> int:
        before = self._chunks(part)[: micro_batch.chunk] if micro_batch.chunk else ()
        base = self._offset[part.group.kv_slot, part.home]
        return base + sum(aligned(rows * self._row_bytes) for rows in before)

    def _chunks(self, part: Part) -> list[int]:
        """Prompt rows of each chunk; prompts are computed before anybody leaves."""
        return chunk_rows(part.group, part.span, chunk_len(self._policy, part.group.size))

    def _as_rows(self, raw: Tensor, count: int) -> Tensor:
        return raw[: count * self._row_bytes].view(self._dtype).view(count, -1)

    def _paged(self, step: Step, part: Part) -> Tensor:
        """The part's page-aligned share of the micro-batch's staging buffer."""
        before = (p for p in step.micro_batch.hidden_parts[: part.index] if p.tier is Tier.DISK)
        start = sum(aligned(p.rows * self._row_bytes) for p in before)
        size = aligned(part.rows * self._row_bytes)
        return self._pages[step.buffer_index][start : start + size]


def _home(micro_batch: MicroBatch, part: Part) -> Home:
    return part.group.kv_slot, micro_batch.chunk, part.home
