"""Hidden states between layers: at home on any tier, or staged on the compute device."""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.engine.device import Device, crossing
from flexgen_bench.memory.host import PAGE
from flexgen_bench.memory.spill import SpillFile
from flexgen_bench.schedule.job import Job, MicroBatch
from flexgen_bench.schedule.steps import Step

Key = tuple[int, int]


class HiddenStates:
    """Hidden states (N, hidden) of every micro-batch of a block, cut into spans by tier."""

    def __init__(
        self,
        job: Job,
        dtype: torch.dtype,
        device: Device,
        spill: SpillFile | None,
        spill_offset: int,
    ) -> None:
        self._job = job
        self._dtype = dtype
        self._device = device
        self._spill = spill
        self._width = job.hidden_row_bytes // dtype.itemsize
        self._on_compute: dict[
            Key, Tensor
        ] = {}  # (batch, part) -> rows that live on the compute tier
        self._at_home: dict[
            Key, Tensor
        ] = {}  # (batch, part) -> memory of rows that live on the host
        self._offset: dict[Key, int] = {}  # (batch, part) -> place in the spill file
        self._staged: dict[Key, Tensor] = {}  # (stage, part) -> rows brought to the compute device
        self._host: dict[Key, Tensor] = {}  # (stage, part) -> rows between disk and an accelerator
        self._pages: dict[Key, Tensor] = {}  # (stage, part) -> aligned bytes for disk transfers
        self._current: dict[int, Tensor] = {}  # stage -> what the last compute step left
        for batch in job.batches:
            for part, span in enumerate(batch.hidden):
                size = batch.tokens(0, span) * job.hidden_row_bytes
                if span.tier is Tier.DISK:
                    self._offset[batch.index, part] = spill_offset
                    spill_offset += page_aligned(size)
                elif span.tier is not job.compute_tier:
                    self._at_home[batch.index, part] = device.allocate(Tier.CPU, size)

    def put(self, step: Step, batch: MicroBatch, x: Tensor) -> None:
        """Compute has made new hidden states; spans that live on the compute tier are home with this."""
        if any(span.tier is not self._job.compute_tier for span in batch.hidden):
            # Only then has the step claimed the stage's buffer: another micro-batch may still be using it.
            self._current[step.stage] = x
        for part, span in enumerate(batch.hidden):
            if span.tier is self._job.compute_tier:
                rows = slice(batch.row(step.token, span.start), batch.row(step.token, span.stop))
                self._on_compute[batch.index, part] = x[rows]

    def take(self, step: Step, batch: MicroBatch) -> Tensor:
        """All rows on the compute device, in order."""
        parts = [
            self._on_compute[batch.index, part]
            if span.tier is self._job.compute_tier
            else crossing(self._staged[step.stage, part])
            for part, span in enumerate(batch.hidden)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def load(self, step: Step, batch: MicroBatch) -> None:
        """LOAD_HIDDEN: disk -> memory, or host -> accelerator."""
        span, stage_key = batch.hidden[step.part], (step.stage, step.part)
        count = batch.tokens(step.token, span)
        if step.lane is Lane.DISK_READ:
            pages = self._paged(stage_key, count)
            assert self._spill is not None
            self._spill.read(self._offset[batch.index, step.part], pages)
            target = self._host if self._job.has_accelerator else self._staged
            target[stage_key] = self._as_rows(pages, count)
            return
        on_disk = span.tier is Tier.DISK
        source = self._host[stage_key] if on_disk else self._home(batch, step.part, count)
        self._staged[stage_key] = self._device.to_compute(source)

    def store(self, step: Step, batch: MicroBatch) -> None:
        """STORE_HIDDEN: accelerator -> host, or memory -> disk."""
        span, stage_key = batch.hidden[step.part], (step.stage, step.part)
        first, last = batch.row(step.token, span.start), batch.row(step.token, span.stop)
        count = last - first
        if step.lane is Lane.DISK_WRITE:
            pages = self._paged(stage_key, count)
            if not self._job.has_accelerator:
                self._as_rows(pages, count).copy_(self._current[step.stage][first:last])
            assert self._spill is not None
            self._spill.write(self._offset[batch.index, step.part], pages)
            return
        rows = self._current[step.stage][first:last]
        on_disk = span.tier is Tier.DISK
        target = (
            self._as_rows(self._paged(stage_key, count), count)
            if on_disk
            else self._home(batch, step.part, count)
        )
        target.copy_(crossing(rows), non_blocking=True)

    def _home(self, batch: MicroBatch, part: int, count: int) -> Tensor:
        return self._as_rows(self._at_home[batch.index, part], count)

    def _as_rows(self, raw: Tensor, count: int) -> Tensor:
        size = count * self._width * self._dtype.itemsize
        return raw[:size].view(self._dtype).view(count, self._width)

    def _paged(self, key: Key, count: int) -> Tensor:
        """Page-aligned bytes for ``count`` rows, from a buffer made once for the largest micro-batch."""
        if key not in self._pages:
            largest = max(batch.tokens(0) for batch in self._job.batches)
            self._pages[key] = self._device.allocate(Tier.CPU, largest * self._job.hidden_row_bytes)
        return self._pages[key][: page_aligned(count * self._job.hidden_row_bytes)]


def page_aligned(size: int) -> int:
    return -(-size // PAGE) * PAGE
