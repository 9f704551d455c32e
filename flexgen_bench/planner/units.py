"""How a model is packed: the extents of its units in one file, and what a load of each moves.

File order: [embedding weights][tables, token table last][head][layer 0][layer 1]... With tied embeddings the head
reads the token table and its own weights as one extent, because they are neighbours; without, only its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.models.family import Inventory, PackedTensor
from flexgen_bench.schedule.job import UnitKind

EXTENT_ALIGN = 4096  # extents start where direct I/O can read
TENSOR_ALIGN = 64  # tensors start on a cache line


@dataclass(frozen=True)
class PackedEntry:
    """One tensor at ``offset`` bytes from the start of the file."""

    tensor: PackedTensor
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class PackedUnit:
    """The extent that one load of a unit reads, and the tensors in it.

    home_bytes: what the unit occupies where it lives; a tied token table counts with the embedding.
    """

    index: int
    kind: UnitKind
    offset: int
    num_bytes: int
    entries: tuple[PackedEntry, ...]
    home_bytes: int
    num_values: int


@dataclass(frozen=True)
class PackedModel:
    """All extents of a packed weight file."""

    units: tuple[PackedUnit, ...]
    tables: tuple[PackedEntry, ...]
    entries: tuple[PackedEntry, ...]  # every tensor once, in file order
    file_bytes: int
    tied: bool

    @property
    def head(self) -> PackedUnit:
        return self.units[-1]


def _align(offset: int, to: int) -> int:
    return -(-offset // to) * to


def pack(shape: ModelShape, inventory: Inventory, dtype: DType) -> PackedModel:
    """Lay out every weight of a model; pure arithmetic."""
    width = dtype.bytes
    cursor = 0
    everything: list[PackedEntry] = []

    def place(tensors: tuple[PackedTensor, ...], align: int) -> tuple[PackedEntry, ...]:
        nonlocal cursor
        cursor = _align(cursor, align)
        placed = []
        for tensor in tensors:
            cursor = _align(cursor, TENSOR_ALIGN)
            entry = PackedEntry(tensor, cursor, tensor.spec.num_values * width)
            placed.append(entry)
            cursor += entry.num_bytes
        everything.extend(placed)
        return tuple(placed)

    def unit(
        index: int, kind: UnitKind, entries: tuple[PackedEntry, ...], start: int, home: int
    ) -> PackedUnit:
        stop = max((e.offset + e.num_bytes for e in entries), default=start)
        values = sum(e.tensor.spec.num_values for e in entries)
        return PackedUnit(
            index,
            kind,
            start,
            _align(stop - start, EXTENT_ALIGN) if entries else 0,
            entries,
            home,
            values,
        )

    embed = place(inventory.embed, EXTENT_ALIGN)
    rest = place(inventory.tables[:-1], EXTENT_ALIGN)
    tokens = place(inventory.tables[-1:], EXTENT_ALIGN)
    head_start = tokens[0].offset
    if not inventory.tied:
        cursor = head_start_own = _align(cursor, EXTENT_ALIGN)
        head_start = head_start_own
    head_own = place(inventory.head, TENSOR_ALIGN)
    head_entries = (*tokens, *head_own) if inventory.tied else head_own
    table_bytes = sum(e.num_bytes for e in (*rest, *tokens))
    units = [
        unit(0, UnitKind.EMBED, embed, 0, table_bytes + sum(e.num_bytes for e in embed)),
    ]
    for i, tensors in enumerate(inventory.layers):
        start = _align(cursor, EXTENT_ALIGN)
        entries = place(tensors, EXTENT_ALIGN)
        units.append(unit(i + 1, UnitKind.LAYER, entries, start, sum(e.num_bytes for e in entries)))
    units.append(
        unit(
            shape.num_layers + 1,
            UnitKind.HEAD,
            head_entries,
            head_start,
            sum(e.num_bytes for e in head_own),
        )
    )
    return PackedModel(
        tuple(units),
        (*rest, *tokens),
        tuple(everything),
        _align(cursor, EXTENT_ALIGN),
        inventory.tied,
    )
