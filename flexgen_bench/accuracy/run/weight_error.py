"""What compression did to the weights: each packed tensor as the engine reads it, against the checkpoint's own
numbers."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flexgen_bench.checkpoints.gguf.rounding import Rounded
from flexgen_bench.core.accuracy import NO_LAYER, LayerError
from flexgen_bench.core.compression import Compression
from flexgen_bench.core.model import DType

if TYPE_CHECKING:
    from torch import Tensor

    from flexgen_bench.engine.build import PackedWeights
    from flexgen_bench.models.packing import PackedEntry

# An independent quantizer: what is left of a matrix (out, in).
Quantizer = Callable[["Tensor", Compression], "Tensor"]


@dataclass(frozen=True)
class WeightErrors:
    """bytes, values: of all tensors as stored (codes, scales, and what is not compressed), without gaps between them.
    by_grid: the error over all compressed tensors of layers that an independent quantizer makes on the same grid."""

    tensors: tuple[LayerError, ...]
    bytes: int
    values: int
    by_grid: float | None


def weight_errors(
    folder: Path, dtype: DType, cache: Path, compression: Compression | None, rounded: Quantizer | None = None
) -> WeightErrors:
    """Relative error of every compressed tensor of the packed store that the engine uses; packs it if it is not there
    yet.

    folder: the checkpoint. One tensor is in memory at a time. Raises StoreError for a damaged checkpoint or store.
    """
    import torch

    from flexgen_bench.checkpoints.source import open_source
    from flexgen_bench.engine.build import PackedWeights

    weights = PackedWeights.from_checkpoint(folder, dtype, cache, compression=compression)
    source = open_source(folder)
    errors, total_bytes, total_values = [], 0, 0
    change = size = 0.0
    try:
        for layer, entry in _entries(weights):
            spec = entry.tensor.spec
            total_bytes += sum(count for _, count in entry.parts)
            total_values += spec.num_values
            if entry.compression is None:
                continue
            sources = [source.tensor(name).float() for name in entry.tensor.sources]
            original = torch.cat(sources) if len(sources) > 1 else sources[0]
            stored = _stored(weights, entry)
            norm = float(original.norm())
            error = float((stored - original).norm()) / norm if norm else 0.0
            errors.append(LayerError(layer, spec.name, spec.num_values, error))
            if rounded is not None and layer != NO_LAYER and isinstance(entry.compression, Compression):
                again = torch.cat([rounded(s, entry.compression).float() for s in sources])
                change += float((again - original).norm()) ** 2
                size += norm**2
    finally:
        source.close()
    by_grid = (change / size) ** 0.5 if size else None
    return WeightErrors(tuple(errors), total_bytes, total_values, by_grid)


def rounding_errors(rounded: Rounded) -> WeightErrors:
    """The same of a checkpoint whose weights were rounded to a published format; bytes are those of its file."""
    errors = []
    for tensor in rounded.tensors:
        layer = re.match(r"blk\.(\d+)\.(.+)", tensor.name)
        if tensor.type != "F32":
            place = (NO_LAYER, tensor.name) if layer is None else (int(layer[1]), layer[2])
            errors.append(LayerError(*place, tensor.values, tensor.error))
    total_bytes, total_values = (sum(getattr(t, name) for t in rounded.tensors) for name in ("bytes", "values"))
    return WeightErrors(tuple(errors), total_bytes, total_values, None)


def _entries(weights: PackedWeights) -> Iterator[tuple[int, PackedEntry]]:
    """Every tensor once, with its layer."""
    layer_of = {entry.offset: unit.index - 1 for unit in weights.packed.units[1:-1] for entry in unit.entries}
    for entry in weights.packed.entries:
        yield layer_of.get(entry.offset, NO_LAYER), entry


def _stored(weights: PackedWeights, entry: PackedEntry) -> Tensor:
    """A compressed tensor as the engine sees it, float32 (out, in)."""
    import torch

    from flexgen_bench.engine.weight_views import view

    start = entry.offset
    handle = os.open(weights.store.path, os.O_RDONLY)
    try:
        data = bytearray(os.pread(handle, entry.num_bytes, start))
    finally:
        os.close(handle)
    weight = view(torch.frombuffer(data, dtype=torch.uint8), entry, start, torch.float32)
    assert not isinstance(weight, torch.Tensor), "only compressed tensors are asked for"
    return weight.rows(0, entry.tensor.spec.shape[0], torch.float32)
