"""Where the original really puts weights: whole tensors, which shares of 100 % only aim at.

In each of its layers (attention and MLP are two) the tensors are lined up in a fixed order, and a tensor goes to the
tier in whose band its middle falls; the bands are disk, cpu, gpu, in this order. With 20 % on the GPU and 80 % on the
cpu an attention layer keeps one of four matrices on the GPU and an MLP none, which makes 8.2 % of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from math import prod

from flexgen_bench.core.compression import Compression
from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.tiers import Tier

# The order of its bands.
BANDS = (Tier.DISK, Tier.CPU, Tier.GPU)


class LayerKind(StrEnum):
    """Layers as the original schedules them."""

    EMBED = "embed"
    ATTENTION = "attention"
    MLP = "mlp"
    BLOCK = "block"  # attention and MLP as one, with sep_layer off
    HEAD = "head"


@dataclass(frozen=True)
class PlacedLayer:
    """Bytes of one layer's weights: as kept per tier, and of its matrices as computed with (float16).

    matrices: sizes in bytes, as kept, of the matrices on each tier.
    """

    kind: LayerKind
    bytes: Mapping[Tier, float]
    matrices: Mapping[Tier, tuple[float, ...]]
    plain_bytes: float

    @property
    def moved_bytes(self) -> float:
        """What has to come to the GPU."""
        return self.bytes[Tier.CPU] + self.bytes[Tier.DISK]


def tier_of(middle: float, gpu: float, cpu: float) -> Tier:
    """The tier for a tensor whose middle lies at ``middle`` percent of its layer."""
    disk = 100 - gpu - cpu
    if middle < disk:
        return Tier.DISK
    return Tier.CPU if middle < disk + cpu else Tier.GPU


def layer_tensors(shape: ModelShape, kind: LayerKind) -> list[tuple[int, ...]]:
    """Shapes of a layer's tensors, in the original's order."""
    h, f, v = shape.hidden_size, shape.ffn_size, shape.vocab_size
    attention: list[tuple[int, ...]] = [(h, h), (h,)] * 4 + [(h,), (h,)]
    mlp: list[tuple[int, ...]] = [(f, h), (f,), (h, f), (h,), (h,), (h,)]
    tensors: dict[LayerKind, list[tuple[int, ...]]] = {
        LayerKind.EMBED: [(v, h), (shape.max_positions + 2, h)],
        LayerKind.ATTENTION: attention,
        LayerKind.MLP: mlp,
        LayerKind.BLOCK: attention + mlp,
        LayerKind.HEAD: [(h,), (h,), (v, h)],
    }
    return tensors[kind]


def place_layer(
    shape: ModelShape, kind: LayerKind, gpu: float, cpu: float, compression: Compression | None
) -> PlacedLayer:
    """Place one layer's tensors for ``gpu`` and ``cpu`` percent. With sep_layer off attention and MLP are still placed
    apart."""
    kinds = (LayerKind.ATTENTION, LayerKind.MLP) if kind is LayerKind.BLOCK else (kind,)
    parts = tuple(tuple(layer_tensors(shape, part)) for part in kinds)
    return _place(kind, parts, gpu, cpu, compression)


@cache
def _place(
    kind: LayerKind,
    parts: tuple[tuple[tuple[int, ...], ...], ...],
    gpu: float,
    cpu: float,
    compression: Compression | None,
) -> PlacedLayer:
    kept = dict.fromkeys(BANDS, 0.0)
    matrices: dict[Tier, list[float]] = {tier: [] for tier in BANDS}
    plain_bytes = 0.0
    for tensors in parts:
        total, before = sum(map(prod, tensors)), 0
        for tensor in tensors:
            size = prod(tensor)
            tier = tier_of(100 * (before + size / 2) / total, gpu, cpu)
            before += size
            is_matrix = len(tensor) > 1
            # Vectors are never compressed.
            width = _bytes_per_value(compression if is_matrix else None)
            kept[tier] += size * width
            if is_matrix:
                matrices[tier].append(size * width)
                plain_bytes += size * 2
    return PlacedLayer(kind, kept, {t: tuple(m) for t, m in matrices.items()}, plain_bytes)


def model_layers(
    shape: ModelShape, gpu: float, cpu: float, compression: Compression | None, sep_layer: bool
) -> list[PlacedLayer]:
    """All layers of a model in the order they are computed. Its head has a token table of its own, tied or not."""
    inner = (LayerKind.ATTENTION, LayerKind.MLP) if sep_layer else (LayerKind.BLOCK,)
    kinds = [LayerKind.EMBED, *(inner * shape.num_layers), LayerKind.HEAD]
    placed = {kind: place_layer(shape, kind, gpu, cpu, compression) for kind in set(kinds)}
    return [placed[kind] for kind in kinds]


def realised_shares(layers: list[PlacedLayer]) -> dict[str, float]:
    """The shares of all weights per tier that come out."""
    total = sum(sum(layer.bytes.values()) for layer in layers)
    return {str(tier): sum(layer.bytes[tier] for layer in layers) / total for tier in (Tier.GPU, Tier.CPU, Tier.DISK)}


def _bytes_per_value(compression: Compression | None) -> float:
    if compression is None:
        return 2.0
    group = compression.group_size
    return compression.row_bytes(group) / group
