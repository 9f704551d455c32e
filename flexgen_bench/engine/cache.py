"""The KV cache of one block: homes on every tier, staging, and where each step reads and writes."""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.engine.device import Device
from flexgen_bench.kernels.attention import Padding
from flexgen_bench.memory.kv_cache import KVHome, KVRegion, Segment
from flexgen_bench.memory.spill import SpillFile
from flexgen_bench.schedule.job import Job, MicroBatch, Span
from flexgen_bench.schedule.steps import Step

TokenKV = tuple[Tensor, Tensor]  # keys and values of one token: (S, G, D) each


class BlockCache:
    """Keys and values of all micro-batches of a block."""

    def __init__(
        self,
        job: Job,
        shape: ModelShape,
        dtype: torch.dtype,
        device: Device,
        spill: SpillFile | None,
        spill_offset: int,
    ) -> None:
        self._job = job
        self._device = device
        self._homes: dict[tuple[int, int], KVHome] = {}
        self._prompt: dict[
            tuple[int, int], Tensor
        ] = {}  # padded prompt K/V on their way home, by (stage, part)
        self._prompt_host: dict[tuple[int, int], Tensor] = {}
        self._host_slots: dict[tuple[int, int], Tensor] = {}
        self._slots: dict[tuple[int, int], Tensor] = {}
        self._new: dict[
            tuple[int, int], Tensor
        ] = {}  # one token's K/V (2, S, G, D) on the compute device
        self._new_host: dict[tuple[int, int], Tensor] = {}
        self._paddings: dict[tuple[int, int, torch.device], Padding | None] = {}
        layers = shape.num_layers
        for batch, layouts in zip(job.batches, job.kv_layouts, strict=True):
            for part, (span, layout) in enumerate(zip(batch.kv, layouts, strict=True)):
                region = KVRegion(layout, shape.num_kv_heads, shape.head_dim, dtype)
                if span.tier is Tier.DISK:
                    tails = device.allocate(Tier.CPU, layout.segment_bytes * layers)
                    home = KVHome(span.tier, region, None, spill, spill_offset, tails)
                    spill_offset += layout.region_bytes * layers
                else:
                    memory = device.allocate(span.tier, layout.region_bytes * layers)
                    if memory.is_cuda:
                        memory.zero_()  # padding is multiplied by zero: it must not hold NaN
                    home = KVHome(span.tier, region, memory)
                self._homes[batch.index, part] = home

    def keep_prompt(self, step: Step, batch: MicroBatch, k: Tensor, v: Tensor) -> None:
        """Prefill: lay the prompt's k, v (N, G, D) out per sequence, at home or on the way there."""
        for part, span in enumerate(batch.kv):
            home = self._homes[batch.index, part]
            if span.tier is self._device.compute_tier:
                target = home.region.prompt(home.raw(step.unit - 1))
            else:
                staging = self._staging(
                    self._prompt, (step.stage, part), "prompt", self._device.compute_tier
                )
                target = home.region.prompt(staging)
            _scatter(target[0], k, batch, span)
            _scatter(target[1], v, batch, span)

    def store(self, step: Step) -> None:
        """STORE_KV: prompt or finished segment to disk, prompt or token from the compute device to the host."""
        home = self._homes[step.batch, step.part]
        key = (step.stage, step.part)
        layer, to_disk = step.unit - 1, home.tier is Tier.DISK
        if step.token:
            if step.lane is Lane.DISK_WRITE:
                home.write_segment(layer, home.region.layout.full_segments(step.token) - 1)
            else:
                self._new_host[key] = self._device.to_host(self._new[key])
            return
        if step.lane is Lane.DISK_WRITE:
            source = self._prompt_host if self._job.has_accelerator else self._prompt
            home.write_prompt(layer, source[key])
            return
        target = (
            self._staging(self._prompt_host, key, "prompt", Tier.CPU)
            if to_disk
            else home.raw(layer)
        )
        size = home.region.layout.prompt_bytes
        target[:size].copy_(self._prompt[key][:size], non_blocking=True)

    def load(self, step: Step) -> None:
        """LOAD_KV: disk -> host slot, or host -> compute device."""
        home, key = self._homes[step.batch, step.part], (step.stage, step.part)
        layout, layer = home.region.layout, step.unit - 1
        full, used = layout.full_segments(step.token - 1), layout.used_segments(step.token - 1)
        if step.lane is Lane.DISK_READ:
            home.read_prefix(layer, full, self._staging(self._host_slots, key, "region", Tier.CPU))
            return
        slot = self._staging(self._slots, key, "region", Tier.GPU)
        if home.tier is Tier.DISK:
            size = layout.prefix_bytes(full)
            slot[:size].copy_(self._host_slots[key][:size], non_blocking=True)
            if used > full:
                slot[size : size + layout.segment_bytes].copy_(home.loose(layer), non_blocking=True)
        else:
            size = layout.prefix_bytes(used)
            slot[:size].copy_(home.raw(layer)[:size], non_blocking=True)

    def attend_in_memory(self, step: Step, k: Tensor, v: Tensor) -> list[Segment]:
        """Append one token's k, v (S, G, D) to a cache in this device's memory; returns all of it."""
        home, layer = self._homes[step.batch, step.part], step.unit - 1
        layout = home.region.layout
        if home.tier is not Tier.DISK:
            home.region.append(home.raw(layer), step.token, k, v)
            return home.region.segments(home.raw(layer), step.token)
        home.region.append_loose(home.loose(layer), step.token, k, v)
        on_disk = layout.full_segments(step.token - 1) * layout.segment_tokens
        segments = home.region.segments(self._host_slots[step.stage, step.part], on_disk)
        tail = home.region.loose_tail(home.loose(layer))[:, :, :, : step.token - on_disk]
        return [*segments, (tail[0], tail[1])]

    def attend_moved(self, step: Step, k: Tensor, v: Tensor) -> list[Segment]:
        """The cache that was moved to the compute device, and the new token, which is kept for its way home."""
        region = self._homes[step.batch, step.part].region
        segments = region.segments(self._slots[step.stage, step.part], step.token - 1)
        self._new[step.stage, step.part] = torch.stack((k, v))
        return [*segments, (k[:, :, None], v[:, :, None])]

    def append(self, step: Step) -> None:
        """APPEND_KV: a token that came back from the compute device, into the cache on the host."""
        home, layer = self._homes[step.batch, step.part], step.unit - 1
        k, v = self._new_host[step.stage, step.part]
        if home.tier is Tier.DISK:
            home.region.append_loose(home.loose(layer), step.token, k, v)
        else:
            home.region.append(home.raw(layer), step.token, k, v)

    def is_moved(self, step: Step, span: Span) -> bool:
        """Whether this ATTEND reads a cache that was moved to an accelerator."""
        return self._job.has_accelerator and step.lane is Lane.GPU and span.tier is not Tier.GPU

    def padding(self, batch: MicroBatch, part: int, device: torch.device) -> Padding | None:
        """Which prompt slots hold a token; None if all do."""
        key = (batch.index, part, device)
        if key not in self._paddings:
            span = batch.kv[part]
            lengths = torch.tensor(batch.prompt_lens[span.start : span.stop])
            self._paddings[key] = Padding.of(lengths, batch.padded_len, device)
        return self._paddings[key]

    def _staging(
        self, pool: dict[tuple[int, int], Tensor], key: tuple[int, int], what: str, tier: Tier
    ) -> Tensor:
        """A staging buffer for (stage, part), made once, large enough for every micro-batch."""
        if key not in pool:
            layouts = [row[key[1]] for row in self._job.kv_layouts if len(row) > key[1]]
            size = max(x.region_bytes if what == "region" else x.prompt_bytes for x in layouts)
            pool[key] = self._device.allocate(tier, size)
            if pool[key].is_cuda:
                pool[key].zero_()
        return pool[key]


def _scatter(target: Tensor, flat: Tensor, batch: MicroBatch, span: Span) -> None:
    """Flattened tokens (N, G, D) of a span's sequences -> (S, G, P, D); slots past a prompt's end stay as they are."""
    lengths = batch.prompt_lens[span.start : span.stop]
    first = batch.offsets[span.start]
    if min(lengths) == target.shape[2]:
        rows = flat[first : batch.offsets[span.stop]]
        target.copy_(rows.view(len(lengths), -1, *flat.shape[1:]).transpose(1, 2))
        return
    for i, length in enumerate(lengths):
        start = batch.offsets[span.start + i]
        target[i, :, :length] = flat[start : start + length].transpose(0, 1)
