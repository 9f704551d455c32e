"""What each part of the original's steps costs: bytes over the rate of the way they take, work over the rate of who
does it."""

from __future__ import annotations

from functools import cached_property

from baselines.common.eager import EagerCompute
from baselines.common.page_cache import cached_share, mapped_rate
from baselines.flexgen_original import memory
from baselines.flexgen_original.block import Block
from baselines.flexgen_original.parts import Part, Runs
from baselines.flexgen_original.placement import LayerKind, PlacedLayer
from flexgen_bench.core.tiers import Tier

# Its attention writes the scores, masks them into a copy and makes weights of them in another one, which is read: 6
# passes.
SCORE_PASSES = 6
# A float16 number is read and written as float32: three times its bytes go over the memory bus.
UPCAST_TRAFFIC = 3
# On the cpu a packed number becomes float32 in five passes (two to unpack, divide, add): 22 bytes of traffic for 2 of
# float16.
CPU_UNPACK_TRAFFIC = 11
# Of a batch in a layer: its keys, its values.
KV_FILES = 2
_HAS_ATTENTION = (LayerKind.ATTENTION, LayerKind.BLOCK)
_HAS_MLP = (LayerKind.MLP, LayerKind.BLOCK)


class Costs:
    """Parts of the steps of one block, of one batch in one layer. needed: what it takes of each tier, by part."""

    def __init__(self, block: Block, needed: dict[Tier, memory.Parts]) -> None:
        self._needed = needed
        self.block, self.machine, self.settings = block, block.machine, block.settings
        self.batch = block.settings.gpu_batch_size
        self.eager = EagerCompute(block.size, block.machine.compute, SCORE_PASSES, block.constants.gpu_attention_share)
        self.unpack_rate = block.constants.unpack_share * block.machine.compute.memory

    @cached_property
    def spare_bytes(self) -> float | None:
        """Host memory that is left to the page cache."""
        have = self.machine.host_bytes
        return None if have is None else have - sum(self._needed[Tier.CPU].values())

    @cached_property
    def cached(self) -> float:
        """The share of what is on disk that is in the page cache."""
        return cached_share(sum(self._needed[Tier.DISK].values()), self.spare_bytes)

    @cached_property
    def disk_rate(self) -> float:
        """At which one file at a time is read: weights, hidden states."""
        machine = self.machine
        return mapped_rate(machine.disk_read, machine.disk_read_cached, self.cached)

    @cached_property
    def kv_disk_rate(self) -> float:
        """At which the keys and the values of a batch are read, two files at a time."""
        machine, share = self.machine, self.block.constants.kv_disk_share
        disk = share * machine.disk_read
        return mapped_rate(disk, machine.disk_read_cached, self.cached, KV_FILES)

    @cached_property
    def write_back_rate(self) -> float:
        """At which the disk gets what was written into the page cache."""
        return self.machine.disk_write

    def load_weights(self, layer: PlacedLayer) -> list[Part]:
        machine, parts = self.machine, []
        on_cpu, on_disk = layer.bytes[Tier.CPU], layer.bytes[Tier.DISK]
        if on_cpu:
            parts.append(Part("h2d: weights", on_cpu / machine.h2d, Runs.LINK))
            if not self.settings.pin_weight:
                rate = self.block.constants.pin_copy_share * machine.cpu.memory
                copies = Part("cpu: copies into page-locked memory", on_cpu / rate, Runs.ON_MAIN)
                parts.append(copies)
        if on_disk:
            parts += self._from_disk("weights", on_disk / self.disk_rate, on_disk)
        return parts

    def load_cache(self, kind: LayerKind, context: float) -> list[Part]:
        """A cache of ``context`` tokens on its way to where attention is computed."""
        if kind not in _HAS_ATTENTION or not context:
            return []
        whole, shares = self.block.kv_bytes(context), self.block.kv_shares
        kept = whole * self.block.kv_packed
        to_gpu = not self.settings.cpu_cache_compute
        parts = []
        if shares[Tier.DISK]:
            on_disk = shares[Tier.DISK] * kept
            parts += self._from_disk("KV cache", on_disk / self.kv_disk_rate, on_disk * to_gpu)
        on_cpu = shares[Tier.CPU]
        if on_cpu and to_gpu:
            pace = min(self.block.constants.kv_load_share * self.machine.cpu.memory, self.machine.h2d)
            parts += [
                Part("h2d: KV cache", on_cpu * kept / self.machine.h2d, Runs.LINK),
                Part("cpu: KV cache to the GPU", on_cpu * kept / pace, Runs.KV_COPY),
            ]
        elif on_cpu and not self.settings.compress_cache:
            rate = self.machine.cpu.memory / UPCAST_TRAFFIC
            parts.append(Part("cpu: KV cache to float32", on_cpu * whole / rate, Runs.ON_MAIN))
        return parts

    def store_cache(self, kind: LayerKind, tokens: float) -> list[Part]:
        """The new ``tokens`` of each sequence on their way home."""
        if kind not in _HAS_ATTENTION:
            return []
        kept, shares = self.block.kv_bytes(tokens) * self.block.kv_packed, self.block.kv_shares
        to_disk = min(self.machine.disk_write_cached, self.machine.d2h)
        return [
            Part("d2h: KV cache", shares[Tier.CPU] * kept / self.machine.d2h_pageable, Runs.STORE),
            Part("disk_write: KV cache", shares[Tier.DISK] * kept / to_disk, Runs.STORE),
        ]

    def move_hidden(self, tokens: float) -> list[Part]:
        """Hidden states to their home and back, in the stream that also computes."""
        if self.block.hidden_on is Tier.GPU:
            return []
        values = self.batch * tokens * self.block.size.shape.hidden_size
        moved, machine = self.block.size.bytes_of(values), self.machine
        parts = [
            Part("d2h: hidden states", moved / machine.d2h, Runs.ON_MAIN),
            Part("h2d: hidden states", moved / machine.h2d, Runs.ON_MAIN),
        ]
        if self.block.hidden_on is Tier.DISK:
            seconds = moved / self.disk_rate + moved / machine.disk_write_cached
            parts.append(Part("disk_write: hidden states", seconds, Runs.ON_MAIN))
        return parts

    def compute(self, layer: PlacedLayer, tokens: int, context: float) -> list[Part]:
        """``tokens`` new tokens of each sequence; context: tokens in the cache, 0 in prefill."""
        kind, rows, eager = layer.kind, self.batch * tokens, self.eager
        products = elementwise = 0.0
        parts: list[Part] = []
        if kind in _HAS_ATTENTION:
            products += eager.attention_products(rows)
            elementwise += eager.attention_elementwise(rows)
            parts += self._decode(context) if context else self._prefill(tokens)
        if kind in _HAS_MLP:
            products += eager.mlp_products(rows)
            elementwise += eager.mlp_elementwise(rows)
        if kind is LayerKind.HEAD:
            products += eager.head_products(rows)
        parts.append(Part("gpu: matrix products", products, Runs.ON_MAIN))
        parts.append(Part("gpu: elementwise", elementwise, Runs.ON_MAIN))
        if self.settings.compress_weight:
            seconds = layer.plain_bytes / self.unpack_rate
            parts.append(Part("gpu: unpacking of weights", seconds, Runs.ON_MAIN))
        return parts

    def _prefill(self, tokens: int) -> list[Part]:
        seconds = self.eager.prefill_attention(self.batch, tokens)
        parts = [Part("gpu: prefill attention", seconds, Runs.ON_MAIN)]
        if self.settings.compress_cache:
            packing = self.block.kv_bytes(tokens) / self.unpack_rate
            parts.append(Part("gpu: packing of the KV cache", packing, Runs.ON_MAIN))
        return parts

    def _decode(self, context: float) -> list[Part]:
        whole = self.block.kv_bytes(context)
        on_gpu = self.block.kv_shares[Tier.GPU] if self.settings.cpu_cache_compute else 1.0
        seconds = on_gpu * self.eager.decode_attention(self.batch, context)
        parts = [Part("gpu: decode attention", seconds, Runs.ON_MAIN)]
        if on_gpu and self.settings.compress_cache:
            seconds = on_gpu * whole / self.unpack_rate
            parts.append(Part("gpu: unpacking of the KV cache", seconds, Runs.ON_MAIN))
        if on_gpu < 1:
            memory_rate, below = self.machine.cpu.memory, (1 - on_gpu) * whole
            seconds = below / (self.block.constants.cpu_attention_share * memory_rate)
            parts.append(Part("cpu: decode attention", seconds, Runs.ON_MAIN))
            if self.settings.compress_cache:
                seconds = below * CPU_UNPACK_TRAFFIC / memory_rate
                parts.append(Part("cpu: unpacking of the KV cache", seconds, Runs.ON_MAIN))
        return parts

    def start(self) -> Part:
        """Python and the launches of one step."""
        seconds = self.block.constants.step_launches * self.machine.compute.step
        return Part("gpu: idle between steps", seconds, Runs.ON_MAIN)

    def _from_disk(self, what: str, read_s: float, sent: float) -> list[Part]:
        """A copy thread reads into its buffer, then sends so many bytes of that to the GPU."""
        parts = [Part(f"disk_read: {what}", read_s, Runs.DISK)]
        if sent:
            parts.append(Part(f"h2d: {what}", sent / self.machine.h2d, Runs.DISK))
        return parts
