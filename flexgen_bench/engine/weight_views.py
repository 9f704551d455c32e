"""A unit's bytes seen as named tensors: plain ones, compressed ones, and compressed ones unpacked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flexgen_bench.core.compression import Along, Compression
from flexgen_bench.core.microscaling import Microscaling
from flexgen_bench.kernels.output_groups import OutputQuantizedWeight
from flexgen_bench.kernels.quantization import QuantizedWeight
from flexgen_bench.memory.weight_store import TORCH_DTYPES
from flexgen_bench.models.packing import PackedEntry, PackedUnit

# What kernels.ops takes as a weight.
Weight = Tensor | QuantizedWeight | OutputQuantizedWeight


def view(memory: Tensor, entry: PackedEntry, base: int, dtype: torch.dtype, activations: int | None = None) -> Weight:
    """One tensor in ``memory`` (uint8), whose first byte is that at ``base`` of the file.

    activations: bits of what 4-bit weights are multiplied with; None: as it is."""
    shape = entry.tensor.spec.shape
    parts = [memory[offset - base :][:count] for offset, count in entry.parts]
    if entry.compression is None:
        return parts[0].view(_dtype(entry, dtype)).view(shape)
    rows, columns = shape
    if isinstance(entry.compression, Compression) and entry.compression.along is Along.OUTPUTS:
        params = parts[1].view(torch.float16).view(-1, 2)
        blocks = entry.tensor.source_rows
        return OutputQuantizedWeight(parts[0], params, (rows, columns), blocks, entry.compression, dtype)
    codes = parts[0].view(rows, entry.compression.code_bytes(columns))
    groups = entry.compression.groups(columns)
    if isinstance(entry.compression, Microscaling):
        return QuantizedWeight(codes, parts[1].view(rows, groups), (rows, columns), entry.compression, dtype)
    params = parts[1].view(torch.float16).view(rows, groups, 2)
    bits = activations if entry.compression.bits == 4 else None
    return QuantizedWeight(codes, params, (rows, columns), entry.compression, dtype, bits)


def _dtype(entry: PackedEntry, dtype: torch.dtype) -> torch.dtype:
    """Of a tensor of a model of this type."""
    return TORCH_DTYPES[entry.tensor.dtype] if entry.tensor.dtype else dtype


def views(
    memory: Tensor, unit: PackedUnit, base: int, dtype: torch.dtype, activations: int | None = None
) -> Mapping[str, Weight]:
    """All tensors of a unit by name."""
    return {e.tensor.spec.name: view(memory, e, base, dtype, activations) for e in unit.entries}


def plain_views(memory: Tensor, unit: PackedUnit, dtype: torch.dtype) -> Mapping[str, Weight]:
    """Where the tensors of a unit go when it is unpacked into ``memory`` (uint8). What its checkpoint has packed stays
    so."""
    tensors: dict[str, Weight] = {}
    for entry, offset in zip(unit.entries, unit.plain_offsets, strict=True):
        if entry.tensor.packing is not None:
            tensors[entry.tensor.spec.name] = view(memory[offset:], entry, entry.offset, dtype)
            continue
        spec, own = entry.tensor.spec, _dtype(entry, dtype)
        flat = memory[offset:][: spec.num_values * own.itemsize].view(own)
        tensors[spec.name] = flat.view(spec.shape)
    return tensors


def unpack(packed: Mapping[str, Weight], plain: Mapping[str, Weight]) -> None:
    """Fill ``plain`` with all of a unit, so that whoever uses it needs the packed bytes no longer."""
    for name, out in plain.items():
        weight = packed[name]
        if isinstance(out, Tensor) and not isinstance(weight, Tensor):
            weight.rows(0, weight.shape[0], out.dtype, out)
        else:
            for to, of in zip(_memory_of(out), _memory_of(weight), strict=True):
                to.copy_(of, non_blocking=True)


def _memory_of(weight: Weight) -> tuple[Tensor, ...]:
    return (weight,) if isinstance(weight, Tensor) else (weight.codes, weight.params)
