"""One tensor of a packed store: from the checkpoint tensors it is made of to its bytes in the file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from flexgen_bench.core.compression import Along, Compression
from flexgen_bench.core.microscaling import Codes
from flexgen_bench.core.model import DType
from flexgen_bench.kernels.microscaling import repacked
from flexgen_bench.kernels.output_groups import quantize_strips
from flexgen_bench.kernels.quantization import quantize
from flexgen_bench.memory.checksum import checksum
from flexgen_bench.models.inventory import Cut

# Values quantized at once, so that the codes of a large embedding are not held as a whole.
BLOCK_VALUES = 1 << 23


@dataclass(frozen=True)
class StoredTensor:
    """One packed tensor: its place in the file and the checkpoint tensors it is concatenated from.

    compression: None, or how its rows are quantized, or are in the checkpoint (MXFP4); its codes are at ``offset``
    then, its parameters at ``params_offset``. dtype: its element type, if not that of the store. cut: what of its
    sources it has, and from which rows on; None: all.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    sources: tuple[str, ...]
    rows: tuple[int, ...]  # rows of each source
    compression: Codes | None = None
    params_offset: int = 0
    dtype: DType | None = None
    cut: Cut | None = None
    firsts: tuple[int, ...] = ()

    def source_shape(self, number: int) -> tuple[int, ...]:
        """The shape that a checkpoint tensor must have."""
        return (self.rows[number], *self.shape[1:]) if self.cut is None else self.cut.shapes[number]

    def own(self, number: int, source: Tensor, width: int = 1) -> Tensor:
        """Of a checkpoint tensor what is its own. width: how many columns each column of ``source`` stands for."""
        if self.cut is None:
            return source
        if self.cut.is_zero:
            return torch.zeros_like(source)
        first = self.firsts[number] if self.firsts else 0
        rows = source[first : first + self.rows[number]]
        return rows if len(self.shape) == 1 else self.own_inputs(rows, width)

    def own_inputs(self, values: Tensor, width: int = 1) -> Tensor:
        """The same of the inputs of a matrix, a dimension 1 of ``values`` (or their only one)."""
        if self.cut is None:
            return values
        first = self.cut.first_column // width
        return values.narrow(min(1, values.dim() - 1), first, self.shape[1] // width)


def write_tensor(
    fd: int,
    stored: StoredTensor,
    sources: Iterable[Tensor],
    dtype: torch.dtype,
    importance: Sequence[Tensor | None] = (),
) -> dict[int, int]:
    """Write a tensor, converted to ``dtype`` or quantized from what it is; returns checksums by offset.

    importance: of the inputs of each source, where its scales are calibrated.
    """
    if stored.compression is None:
        return _Region(fd, stored.offset).filled_with(source.to(dtype) for source in sources)
    codes, params = _Region(fd, stored.offset), _Region(fd, stored.params_offset)
    assert isinstance(stored.compression, Compression), "what is in codes already has a function of its own"
    for source, weights in zip_longest(sources, importance):
        for block in _row_blocks(source, stored.compression):
            for packed in _quantized(block, stored.compression, weights):
                codes.append(packed[0])
                params.append(packed[1])
    return _whole(stored, codes, params)


def write_microscaled(fd: int, stored: StoredTensor, sources: Iterable[tuple[Tensor, Tensor]]) -> dict[int, int]:
    """Write a tensor from the blocks (R, groups, 16) and scales (R, groups) of MXFP4 that it is made of; returns
    checksums by offset."""
    codes, params = _Region(fd, stored.offset), _Region(fd, stored.params_offset)
    for blocks, scales in sources:
        codes.append(repacked(blocks))
        params.append(scales)
    return _whole(stored, codes, params)


def _whole(stored: StoredTensor, codes: _Region, params: _Region) -> dict[int, int]:
    assert stored.compression is not None
    expected = stored.compression.matrix_bytes(stored.rows, stored.shape[1])
    assert (codes.written, params.written) == expected, (codes.written, params.written, expected)
    return codes.checksums | params.checksums


class _Region:
    """A run of bytes in the file, written from its start, and the checksum of what was."""

    def __init__(self, fd: int, offset: int) -> None:
        self._fd, self._offset = fd, offset
        self._sum, self.written = 0, 0

    def append(self, tensor: Tensor) -> None:
        data = _bytes_of(tensor)
        self._sum = checksum(data, self._sum)
        self.written += _write_all(self._fd, data, self._offset + self.written)

    def filled_with(self, tensors: Iterable[Tensor]) -> dict[int, int]:
        for tensor in tensors:
            self.append(tensor)
        return self.checksums

    @property
    def checksums(self) -> dict[int, int]:
        return {self._offset: self._sum}


def _quantized(block: Tensor, compression: Compression, importance: Tensor | None) -> Iterable[tuple[Tensor, Tensor]]:
    if compression.along is Along.OUTPUTS:
        return quantize_strips(block, compression)
    return [quantize(block, compression, importance)]


def _row_blocks(tensor: Tensor, compression: Compression) -> Iterator[Tensor]:
    """Some rows at a time, whole groups of them where groups go down the columns."""
    unit = compression.group_size if compression.along is Along.OUTPUTS else 1
    yield from tensor.split(max(1, BLOCK_VALUES // (unit * tensor.shape[1])) * unit)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data


def _write_all(fd: int, data: memoryview, offset: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done : done + (1 << 30)], offset + done)
    return done
