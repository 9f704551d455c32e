"""One tensor of a packed store: from the checkpoint tensors it is made of to its bytes in the file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from flexgen_bench.core.compression import Along, Compression
from flexgen_bench.core.model import DType
from flexgen_bench.kernels.output_groups import quantize_strips
from flexgen_bench.kernels.quantization import quantize
from flexgen_bench.memory.checksum import checksum

# Values quantized at once, so that the codes of a large embedding are not held as a whole.
BLOCK_VALUES = 1 << 23


@dataclass(frozen=True)
class StoredTensor:
    """One packed tensor: its place in the file and the checkpoint tensors it is concatenated from.

    compression: None, or how its rows are quantized; its codes are at ``offset`` then, its parameters at
    ``params_offset``. dtype: its element type, if not that of the store.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    sources: tuple[str, ...]
    rows: tuple[int, ...]  # rows each source must have
    compression: Compression | None = None
    params_offset: int = 0
    dtype: DType | None = None


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
    for source, weights in zip_longest(sources, importance):
        for block in _row_blocks(source, stored.compression):
            for packed in _quantized(block, stored.compression, weights):
                codes.append(packed[0])
                params.append(packed[1])
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
