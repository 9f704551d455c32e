"""Rows of an embedding table, from memory or from disk; compressed rows are unpacked alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexgen_bench.core.compression import GROUP_PARAMETER_BYTES
from flexgen_bench.core.units import PAGE, aligned
from flexgen_bench.engine.weight_views import Weight
from flexgen_bench.kernels.output_groups import OutputQuantizedWeight
from flexgen_bench.kernels.quantization import dequantize
from flexgen_bench.memory.direct_file import DirectFile
from flexgen_bench.memory.host import allocate
from flexgen_bench.models.packing import PackedEntry


def rows_in_memory(table: Weight, indices: Tensor, pinned: bool = False) -> Tensor:
    """(N,) indices -> (N, E), on the table's device. pinned: a plain table on the host gives page-locked rows, ready to
    be moved."""
    assert not isinstance(table, OutputQuantizedWeight), "tables are grouped within their rows"
    if isinstance(table, Tensor):
        rows = table.new_empty((len(indices), table.shape[1]), pin_memory=pinned)
        return torch.index_select(table, 0, indices.to(table.device), out=rows)
    device_indices = indices.to(table.codes.device)
    codes, params = table.codes.index_select(0, device_indices), table.params.index_select(0, device_indices)
    return dequantize(codes, params, table.shape[1], table.compression, table.dtype)


def rows_on_disk(file: DirectFile, entry: PackedEntry, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,) indices -> (N, E). Reads just the pages that hold the logit rows: a row is far smaller than its table."""
    width = entry.tensor.spec.shape[1]
    distinct, back = torch.unique(indices.cpu(), return_inverse=True)
    rows = distinct.tolist()
    if entry.compression is None:
        values = _read(file, entry.offset, width * dtype.itemsize, rows).view(dtype)
        return values[back]
    groups = entry.compression.groups(width)
    codes = _read(file, entry.offset, entry.compression.code_bytes(width), rows)
    params = _read(file, entry.params_offset, groups * GROUP_PARAMETER_BYTES, rows)
    params = params.view(torch.float16).view(len(rows), groups, 2)
    return dequantize(codes, params, width, entry.compression, dtype)[back]


def _read(file: DirectFile, base: int, size: int, rows: Sequence[int]) -> Tensor:
    """Rows of ``size`` bytes of a table that starts at ``base``: uint8 (rows, size)."""
    window = allocate(aligned(size) + PAGE)
    row_bytes = torch.empty((len(rows), size), dtype=torch.uint8)
    for place, row in enumerate(rows):
        first = base + row * size
        start = first // PAGE * PAGE
        length = aligned(first + size - start)
        file.read(start, window[:length])
        row_bytes[place] = window[first - start :][:size]
    return row_bytes
