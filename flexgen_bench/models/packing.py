"""How a model is packed: the extents of its units in one file, and what a load of each moves.

File order: [embedding weights][tables, token table last][head][layer 0][layer 1]... With tied embeddings the head
reads the token table and its own weights as one extent, because they are neighbours; without, only its own.

Compressed weights: every matrix that is multiplied with or gathered from by token is quantized in groups along its last
(input) dimension, so that a row of codes and its parameters speak for themselves: rows of a table are gathered alone,
and any range of output rows is unpacked alone. On request the groups lie along outputs, as in the original; then a row
needs the parameters of
63 others. Matrices with a row for each token (the token table, the head) have 8 bits and groups within their rows
whatever is asked for the others. Position tables, norms and biases stay as they are: they are small, and added rather
than multiplied.

What a checkpoint has packed itself (MXFP4) stays as it is, whatever is asked for the others: it is exact, and smaller
than 4 bits with a scale and a smallest value for each group.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_bench.core.compression import Compression
from flexgen_bench.core.microscaling import Codes, Microscaling
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.units import PAGE, aligned
from flexgen_bench.models.inventory import SINKS, Inventory, PackedTensor
from flexgen_bench.schedule.scheduled_job import UnitKind

EXTENT_ALIGN = PAGE  # extents start where direct I/O can read
TENSOR_ALIGN = 64  # tensors start on a cache line


@dataclass(frozen=True)
class PackedEntry:
    """One tensor at ``offset`` bytes from the start of the file.

    A compressed one is all its codes, (rows, code bytes of a row), then from ``params_offset`` all its parameters,
    (rows, groups, 2) in float16, of MXFP4 (rows, groups) in bytes; along outputs, both are in the order of
    kernels/output_groups.py. num_bytes covers both, and the gap between them.
    """

    tensor: PackedTensor
    offset: int
    num_bytes: int
    compression: Codes | None = None

    @property
    def code_bytes(self) -> int:
        """Bytes of a compressed tensor's codes."""
        assert self.compression is not None, "only compressed tensors have codes"
        return _matrix_bytes(self.tensor, self.compression)[0]

    @property
    def params_offset(self) -> int:
        return aligned(self.offset + self.code_bytes, TENSOR_ALIGN)

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """(offset, bytes) of what is written and checked as one: the tensor, or its codes and its parameters."""
        if self.compression is None:
            return ((self.offset, self.num_bytes),)
        stop = self.offset + self.num_bytes
        return ((self.offset, self.code_bytes), (self.params_offset, stop - self.params_offset))


@dataclass(frozen=True)
class ExpertBlocks:
    """Where a layer's experts lie: one block each, one after the other, from ``offset`` bytes of the file to the end of
    the layer's extent. All blocks have ``num_bytes``, of whole pages, so that any of them can be read alone."""

    count: int
    offset: int
    num_bytes: int

    def range(self, expert: int) -> tuple[int, int]:
        """(offset in the file, bytes) of an expert."""
        return self.offset + expert * self.num_bytes, self.num_bytes


@dataclass(frozen=True)
class PackedUnit:
    """The extent that one load of a unit reads, and the tensors in it.

    home_bytes: what the unit occupies in memory where it lives; a tied head counts with the embedding.
    plain_offsets, plain_bytes: where each entry lies in the unpacked unit, and the bytes of that, in which what the
    checkpoint has packed still is; () and 0 if nothing else in the unit is compressed, so that there is nothing to
    unpack. experts: those of a mixture, behind all the rest. companion: of a layer whose experts are a unit of their
    own, its number, and of these that of their layer; -1: none.
    """

    index: int
    kind: UnitKind
    offset: int
    num_bytes: int
    entries: tuple[PackedEntry, ...]
    home_bytes: int
    num_values: int
    plain_offsets: tuple[int, ...] = ()
    plain_bytes: int = 0
    experts: ExpertBlocks | None = None
    companion: int = -1

    @property
    def dense_bytes(self) -> int:
        """Of its extent, from its start, what every token meets: all of it but experts."""
        return self.num_bytes if self.experts is None else self.experts.offset - self.offset

    @property
    def packing(self) -> Microscaling | None:
        """Of its experts, as the checkpoint has them."""
        return next((e.tensor.packing for e in self.entries if e.tensor.packing is not None), None)

    @property
    def sinks(self) -> PackedEntry | None:
        """The attention sinks of a layer, if it has any."""
        return next((e for e in self.entries if e.tensor.spec.name == SINKS), None)

    @property
    def sink_bytes(self) -> int:
        """Of its attention sinks on a site that attends: float32."""
        return 0 if self.sinks is None else 4 * self.sinks.tensor.spec.num_values


@dataclass(frozen=True)
class PackedModel:
    """All extents of a packed weight file."""

    units: tuple[PackedUnit, ...]
    tables: tuple[PackedEntry, ...]
    entries: tuple[PackedEntry, ...]  # every tensor once, in file order
    file_bytes: int
    tied: bool
    compression: Compression | None = None

    @property
    def head(self) -> PackedUnit:
        return next(unit for unit in self.units if unit.kind is UnitKind.HEAD)


def pack(shape: ModelShape, inventory: Inventory, dtype: DType, compression: Compression | None = None) -> PackedModel:
    """Lay out every weight of a model; pure arithmetic. dtype: of what is not compressed, and of what is unpacked."""
    cursor = 0
    everything: list[PackedEntry] = []
    uncompressed = inventory.tables[:-1]  # positions

    def place(tensors: tuple[PackedTensor, ...], align: int) -> tuple[PackedEntry, ...]:
        nonlocal cursor
        cursor = aligned(cursor, align)
        placed: list[PackedEntry] = []
        for tensor in tensors:
            begins_expert = tensor.expert is not None and (not placed or placed[-1].tensor.expert != tensor.expert)
            cursor = aligned(cursor, EXTENT_ALIGN if begins_expert else TENSOR_ALIGN)
            is_matrix = len(tensor.spec.shape) == 2 and tensor not in uncompressed
            kind: Codes | None = compression if is_matrix and not tensor.exact else None
            if kind is compression and compression is not None and tensor in inventory.vocabulary:
                kind = compression.of_vocabulary
            entry = _entry(tensor, cursor, dtype, tensor.packing or kind)
            placed.append(entry)
            cursor += entry.num_bytes
        everything.extend(placed)
        return tuple(placed)

    def unit(
        index: int, kind: UnitKind, entries: tuple[PackedEntry, ...], start: int, home: int | None = None
    ) -> PackedUnit:
        stop = max((e.offset + e.num_bytes for e in entries), default=start)
        offsets, plain_bytes = unpacked_layout(entries, dtype)
        num_bytes = aligned(stop - start, EXTENT_ALIGN) if entries else 0
        return PackedUnit(
            index=index,
            kind=kind,
            offset=start,
            num_bytes=num_bytes,
            entries=entries,
            home_bytes=num_bytes if home is None else home,
            num_values=sum(e.tensor.spec.num_values for e in entries),
            plain_offsets=offsets,
            plain_bytes=plain_bytes,
            experts=_expert_blocks(entries),
        )

    embed = place(inventory.embed, EXTENT_ALIGN)
    rest = place(inventory.tables[:-1], EXTENT_ALIGN)
    tokens = place(inventory.tables[-1:], EXTENT_ALIGN)
    head_start = tokens[0].offset
    if not inventory.tied:
        cursor = head_start_own = aligned(cursor, EXTENT_ALIGN)
        head_start = head_start_own
    head_own = place(inventory.head, TENSOR_ALIGN)
    head_entries = (*tokens, *head_own) if inventory.tied else head_own
    # In memory the embedding is one extent from the start of the file: with its tables, and with a tied head.
    last = (*rest, *tokens, *(head_own if inventory.tied else ()))
    table_stop = aligned(max(e.offset + e.num_bytes for e in last), EXTENT_ALIGN)
    units = [unit(0, UnitKind.EMBED, embed, 0, table_stop)]
    for i, tensors in enumerate(inventory.layers):
        start = aligned(cursor, EXTENT_ALIGN)
        units.append(unit(i + 1, UnitKind.LAYER, place(tensors, EXTENT_ALIGN), start))
    head_home = 0 if inventory.tied else None
    number = shape.num_layers + 1
    units.append(unit(number, UnitKind.HEAD, head_entries, head_start, head_home))
    return PackedModel(
        tuple(units), (*rest, *tokens), tuple(everything), aligned(cursor, EXTENT_ALIGN), inventory.tied, compression
    )


def _expert_blocks(entries: tuple[PackedEntry, ...]) -> ExpertBlocks | None:
    """Every expert has matrices of the same shapes, and starts on a page of its own."""
    starts = {e.tensor.expert: e.offset for e in reversed(entries) if e.tensor.expert is not None}
    if not starts:
        return None
    last = entries[-1]
    size = aligned(last.offset + last.num_bytes - starts[len(starts) - 1], EXTENT_ALIGN)
    return ExpertBlocks(len(starts), starts[0], size)


def _entry(tensor: PackedTensor, offset: int, dtype: DType, compression: Codes | None) -> PackedEntry:
    if compression is None:
        return PackedEntry(tensor, offset, tensor.plain_bytes(dtype))
    codes, params = _matrix_bytes(tensor, compression)
    return PackedEntry(tensor, offset, aligned(codes, TENSOR_ALIGN) + params, compression)


def _matrix_bytes(tensor: PackedTensor, compression: Codes) -> tuple[int, int]:
    """Of codes and of parameters. Groups never reach from one checkpoint tensor into the next."""
    return compression.matrix_bytes(tensor.source_rows, tensor.spec.shape[1])


def unpacked_layout(entries: tuple[PackedEntry, ...], dtype: DType) -> tuple[tuple[int, ...], int]:
    """Where each tensor of a unit lies once all are unpacked, and the bytes in all; nothing if none is compressed."""
    if not any(isinstance(e.compression, Compression) for e in entries):
        return (), 0
    offsets, cursor = [], 0
    for entry in entries:
        cursor = aligned(cursor, TENSOR_ALIGN)
        offsets.append(cursor)
        cursor += entry.num_bytes if entry.tensor.packing else entry.tensor.plain_bytes(dtype)
    return tuple(offsets), cursor
