"""What the packed store of a model must hold."""

from __future__ import annotations

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.slices import Slice
from flexgen_bench.memory.stored_tensor import StoredTensor
from flexgen_bench.memory.weight_store import StorePlan
from flexgen_bench.models.family import ModelFamily
from flexgen_bench.models.packing import PackedModel


def store_plan(
    family: ModelFamily, shape: ModelShape, packed: PackedModel, dtype: DType, part: Slice | None = None
) -> StorePlan:
    """What the packed store of a model must hold: tables, embedding and head together, then layer by layer. part: of
    which slice it is, which has a store of its own."""
    stored = {
        e.offset: StoredTensor(
            e.tensor.spec.name,
            e.tensor.spec.shape,
            e.offset,
            e.num_bytes,
            e.tensor.sources,
            e.tensor.source_rows,
            e.compression,
            e.params_offset if e.compression else 0,
            e.tensor.dtype,
            e.tensor.cut,
            e.tensor.firsts,
        )
        for e in packed.entries
    }
    layers = [tuple(stored[e.offset] for e in u.entries) for u in packed.units[1:-1]]
    in_layers = {t.offset for group in layers for t in group}
    rest = tuple((tensor,) for offset, tensor in stored.items() if offset not in in_layers)
    return StorePlan(
        groups=(*rest, *layers),
        file_bytes=packed.file_bytes,
        dtype=dtype,
        prefixes=family.prefixes,
        description=to_json(shape) | ({} if part is None else {"slice": to_json(part)}),
        compression=packed.compression,
    )
