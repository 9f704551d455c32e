"""One block of the original on one machine, or on one stage of a pipeline: settings, model, placed weights, cache
bytes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from baselines.common.machine import Machine
from baselines.common.model_size import ModelSize
from baselines.flexgen_original.placement import LayerKind, PlacedLayer, model_layers
from baselines.flexgen_original.settings import COMPRESSION, Settings
from flexgen_bench.core.tiers import Tier

# 4 threads with a page-locked buffer of 2^30 float16 numbers each, always.
RELAY_BYTES = 4 * 2 * 2**30
PACKED_SHARE = COMPRESSION.row_bytes(COMPRESSION.group_size) / (2 * COMPRESSION.group_size)


@dataclass(frozen=True)
class Constants:
    """Of conf/system/flexgen_original.yaml, where each is explained."""

    cpu_attention_share: float
    gpu_attention_share: float
    unpack_share: float
    pin_copy_share: float
    kv_load_share: float
    kv_disk_share: float
    step_launches: float
    network: float


# Where only bytes are asked about.
NO_CONSTANTS = Constants(*[math.nan] * 8)


@dataclass(frozen=True)
class Block:
    """``stages``: machines that share the layers; ``layers`` are those of the last stage, the slowest, or of one before
    it."""

    settings: Settings
    size: ModelSize
    machine: Machine
    constants: Constants
    prompt_len: int
    gen_len: int
    stages: int = 1
    is_last: bool = True

    @cached_property
    def all_layers(self) -> list[PlacedLayer]:
        gpu, cpu = self.settings.percent[:2]
        packed = COMPRESSION if self.settings.compress_weight else None
        return model_layers(self.size.shape, gpu, cpu, packed, self.settings.sep_layer)

    @cached_property
    def layers(self) -> list[PlacedLayer]:
        """This stage's share of the layers, the last one's with the head; all without a pipeline."""
        if self.stages == 1:
            return self.all_layers
        inner = self.all_layers[1:-1]
        per_block = 2 if self.settings.sep_layer else 1
        blocks = -(-(len(inner) // per_block) // self.stages)
        return [*inner[: blocks * per_block], *([self.all_layers[-1]] if self.is_last else [])]

    @cached_property
    def counted(self) -> list[tuple[PlacedLayer, int]]:
        """Layers of each kind, and how many there are of it."""
        kinds = {layer.kind: layer for layer in self.layers}
        counts = Counter(layer.kind for layer in self.layers)
        return [(layer, counts[kind]) for kind, layer in kinds.items()]

    @cached_property
    def neighbours(self) -> list[tuple[tuple[PlacedLayer, PlacedLayer, PlacedLayer], int]]:
        """A layer with the ones before and after it in the endless sequence of passes, and how often these kinds
        meet."""
        layers, known = self.layers, {layer.kind: layer for layer, _ in self.counted}
        kinds = [layer.kind for layer in layers]
        met = Counter(zip([kinds[-1], *kinds[:-1]], kinds, [*kinds[1:], kinds[0]], strict=True))
        return [((known[a], known[b], known[c]), count) for (a, b, c), count in met.items()]

    @cached_property
    def num_blocks(self) -> int:
        """Decoder layers of the stage."""
        with_attention = (LayerKind.ATTENTION, LayerKind.BLOCK)
        return sum(count for layer, count in self.counted if layer.kind in with_attention)

    @cached_property
    def kv_shares(self) -> dict[Tier, float]:
        """The shares of sequences whose cache is on each tier, of one batch; mixed ones in whole sequences, rounded
        down."""
        gpu, cpu = self.settings.percent[2:4]
        batch = self.settings.gpu_batch_size
        if 100 in (gpu, cpu, 100 - gpu - cpu):
            return {Tier.GPU: gpu / 100, Tier.CPU: cpu / 100, Tier.DISK: (100 - gpu - cpu) / 100}
        on_gpu, on_cpu = batch * gpu // 100, batch * cpu // 100
        if gpu + cpu == 100:
            on_cpu = batch - on_gpu
        return {Tier.GPU: on_gpu / batch, Tier.CPU: on_cpu / batch, Tier.DISK: (batch - on_gpu - on_cpu) / batch}

    @property
    def kv_packed(self) -> float:
        """Bytes of the cache as kept over float16."""
        return PACKED_SHARE if self.settings.compress_cache else 1.0

    def kv_bytes(self, tokens: float) -> float:
        """Of one batch in one layer, in float16."""
        return self.settings.gpu_batch_size * tokens * self.size.kv_bytes_per_token_layer

    def cache_bytes(self, tier: Tier) -> float:
        """What is set aside for the caches of everything in flight (a pipeline has a block per stage)."""
        full = self.kv_bytes(self.prompt_len + self.gen_len - 1) * self.settings.num_gpu_batches
        return full * self.stages * self.num_blocks * self.kv_packed * self.kv_shares[tier]

    def weight_bytes(self, tier: Tier) -> float:
        return sum(count * layer.bytes[tier] for layer, count in self.counted)

    @property
    def hidden_on(self) -> Tier:
        gpu, cpu = self.settings.percent[4:]
        return Tier.GPU if gpu else Tier.CPU if cpu else Tier.DISK

    @property
    def hidden_bytes(self) -> float:
        """Of one batch's prompt."""
        tokens = self.settings.gpu_batch_size * self.prompt_len
        return self.size.bytes_of(tokens * self.size.shape.hidden_size)
