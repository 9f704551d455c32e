"""A rank's slice of a model: of its parts, and of the tensors they are made of (``core/slices.py``).

Rows of q, k and v belong to heads, and so do columns of the output projection; rows of an MLP's first matrices belong
to its width, and so do columns of its last one. Biases of what is summed over the ranks are zeros on all but the first,
so that all ranks have tensors of the same shapes, and place and schedule them alike. Everything else is whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from flexgen_bench.core.compression import Along
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape, TensorSpec
from flexgen_bench.core.slices import Slice
from flexgen_bench.models.inventory import SINKS, Cut, Inventory, PackedTensor
from flexgen_bench.models.packing import PackedModel
from flexgen_bench.models.parts import MLP, Attention, Decoder, Experts, Layer

Rows = Sequence[range]


def sliced_shape(shape: ModelShape, part: Slice) -> ModelShape:
    """Heads and widths of a slice. (Of a mixture ``ffn_size`` may be of no layer: rounded up, it says nothing.)"""
    return replace(
        shape,
        num_heads=len(part.of(shape.num_heads, "query heads")),
        num_kv_heads=len(part.of(shape.num_kv_heads, "key/value heads")),
        ffn_size=-(-shape.ffn_size // part.ranks),
    )


def sliced_layers(decoder: Decoder, part: Slice) -> tuple[Layer, ...]:
    """The parts of every layer."""
    kinds = {
        layer: replace(layer, attention=_attention(layer.attention, part), mlp=_mlp_or_experts(layer.mlp, part))
        for layer in decoder.kinds
    }
    return tuple(kinds[layer] for layer in decoder.layers)


def _attention(attention: Attention, part: Slice) -> Attention:
    _qkv_rows(attention, part)  # refuses what cannot be divided
    own = part.of(attention.heads, "query heads")
    slopes = attention.mod.slopes
    return replace(
        attention,
        heads=len(own),
        kv_heads=len(part.of(attention.kv_heads, "key/value heads")),
        blocks=max(1, attention.blocks // part.ranks),
        mod=replace(attention.mod, slopes=slopes[own.start : own.stop]) if slopes else attention.mod,
    )


def _mlp_or_experts(mlp: MLP | Experts, part: Slice) -> MLP | Experts:
    if isinstance(mlp, MLP):
        return replace(mlp, width=len(part.of(mlp.width, "columns of an MLP's width")))
    expert, shared = _mlp_or_experts(mlp.expert, part), mlp.shared and _mlp_or_experts(mlp.shared, part)
    assert isinstance(expert, MLP)
    assert not isinstance(shared, Experts)
    return replace(mlp, expert=expert, shared=shared)


def sliced_inventory(inventory: Inventory, decoder: Decoder, part: Slice) -> Inventory:
    """The tensors of a slice, in the same order and under the same names. decoder: of the whole model."""
    layers = zip(inventory.layers, decoder.layers, strict=True)
    return replace(
        inventory, layers=tuple(tuple(_sliced(tensor, layer, part) for tensor in own) for own, layer in layers)
    )


def check_groups(packed: PackedModel) -> None:
    """UserError where a group of compressed weights would lie on two ranks: then it would be another group."""
    for entry in packed.entries:
        tensor, codes = entry.tensor, entry.compression
        if tensor.cut is None or codes is None:
            continue
        along_inputs = codes.along is Along.INPUTS
        if along_inputs and tensor.spec.shape[1] == tensor.cut.shapes[0][1]:
            continue
        sizes = (tensor.spec.shape[1],) if along_inputs else tensor.source_rows
        cut = [size for size in sizes if size % codes.group_size]
        if cut:
            raise UserError(
                "policy.lossy.weights" if tensor.packing is None else "gpu.tensor_parallel",
                str(codes),
                f"groups that no rank cuts: {tensor.spec.name} has {cut[0]} values on each rank along groups of "
                f"{codes.group_size}",
                "Use fewer ranks, or a group size that divides them.",
            )


def _sliced(tensor: PackedTensor, layer: Layer, part: Slice) -> PackedTensor:
    name = tensor.spec.name
    columns = _summed_columns(name, layer, part)
    if columns is not None:
        return _summed(tensor, columns, part)
    rows = _own_rows(name, layer, part)
    return tensor if rows is None else _of_rows(tensor, rows)


def _summed_columns(name: str, layer: Layer, part: Slice) -> range | None:
    """Columns of a matrix whose products are summed over all ranks; None of any other tensor."""
    if name.startswith("out."):
        own = part.of(layer.attention.heads, "query heads")
        return range(own.start * layer.attention.head_dim, own.stop * layer.attention.head_dim)
    mlp, own_name = _mlp_of(name, layer)
    if mlp is None or not own_name.startswith("down."):
        return None
    return part.of(mlp.width, "columns of an MLP's width")


def _own_rows(name: str, layer: Layer, part: Slice) -> Rows | None:
    """Rows of a tensor that has one for each of what ranks divide; None of what all of them have."""
    if name == SINKS:
        return [part.of(layer.attention.heads, "query heads")]
    if name.startswith("qkv."):
        return _qkv_rows(layer.attention, part)
    mlp, own_name = _mlp_of(name, layer)
    if mlp is None or not own_name.startswith(("gate_up.", "up.")):
        return None
    width = part.of(mlp.width, "columns of an MLP's width")
    if mlp.clamp is not None:  # rows of the gate and of what is up take turns
        return [range(2 * width.start, 2 * width.stop)]
    return [width, range(mlp.width + width.start, mlp.width + width.stop)] if mlp.gated else [width]


def _mlp_of(name: str, layer: Layer) -> tuple[MLP | None, str]:
    """The MLP that a tensor of a layer is of, and its name there; None of another part."""
    if isinstance(layer.mlp, MLP):
        return layer.mlp, name
    if name.startswith("experts."):
        return layer.mlp.expert, name.split(".", 2)[2]
    return (layer.mlp.shared, name.removeprefix("shared.")) if name.startswith("shared.") else (None, name)


def _qkv_rows(attention: Attention, part: Slice) -> list[range]:
    """Rows of the fused projection: whole blocks, or of one block a share of its queries, keys and values."""
    part.of(attention.heads, "query heads")
    part.of(attention.kv_heads, "key/value heads")
    sizes = [count * attention.head_dim for count in attention.heads_per_block]
    block = sum(sizes)
    if attention.blocks % part.ranks == 0:
        own = part.of(attention.blocks, "blocks of heads")
        return [range(own.start * block, own.stop * block)]
    if part.ranks % attention.blocks:
        raise UserError(
            "gpu.tensor_parallel",
            part.ranks,
            f"a divisor or a multiple of the {attention.blocks} blocks in which the model's heads are stored",
        )
    number, place = divmod(part.rank, part.ranks // attention.blocks)
    within = Slice(place, part.ranks // attention.blocks)
    starts = accumulate(sizes[:-1], initial=number * block)
    own_rows = [(start, within.of(size, "rows of a block")) for start, size in zip(starts, sizes, strict=True)]
    return [range(start + rows.start, start + rows.stop) for start, rows in own_rows]


def _of_rows(tensor: PackedTensor, wanted: Rows) -> PackedTensor:
    """The same of these rows alone, which are of any of its sources."""
    pieces: list[tuple[str, int, int, tuple[int, ...]]] = []
    firsts = tensor.firsts or (0,) * len(tensor.sources)
    for rows in wanted:
        start = 0
        for source, count, skipped in zip(tensor.sources, tensor.source_rows, firsts, strict=True):
            low, high = max(rows.start, start), min(rows.stop, start + count)
            if low < high:
                pieces.append((source, high - low, skipped + low - start, (count, *tensor.spec.shape[1:])))
            start += count
    sources, counts, skips, shapes = zip(*pieces, strict=True)
    spec = TensorSpec(tensor.spec.name, (sum(counts), *tensor.spec.shape[1:]))
    return replace(tensor, spec=spec, sources=sources, rows=counts, firsts=skips, cut=Cut(shapes))


def _summed(tensor: PackedTensor, columns: range, part: Slice) -> PackedTensor:
    """The same of what is summed over all ranks: of a matrix its columns, of a bias everything or nothing."""
    spec = tensor.spec
    shapes = tuple((count, *spec.shape[1:]) for count in tensor.source_rows)
    if len(spec.shape) == 1:
        return tensor if part.adds else replace(tensor, cut=Cut(shapes, is_zero=True))
    return replace(tensor, spec=TensorSpec(spec.name, (spec.shape[0], len(columns))), cut=Cut(shapes, columns.start))
