"""Weights quantized in groups along their outputs, the original's layout: of one input, a run of neighbouring outputs
is a group.

A weight (out, in) is cut into blocks of rows, one for each tensor of the checkpoint that it is made of, and a block
into
*strips* of ``group_size`` rows (its last strip may have fewer): groups never reach from one checkpoint tensor into the
next. A strip of w rows is kept transposed, (in, w): each of its rows is one group, in the layout of
kernels/quantization.py. All codes follow each other strip by strip, then all parameters, so that a range of output rows
is a range of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flexgen_bench.core.compression import Along, Compression
from flexgen_bench.kernels.quantization import dequantize, quantize

# Bytes of values unpacked at once: on a processor about what its L2 cache holds.
CPU_BYTES, DEVICE_BYTES = 1 << 20, 64 << 20


@dataclass(frozen=True)
class _Run:
    """Strips of the same width that follow each other: ``count`` of ``width`` rows from output row ``row`` on.

    code, group: where the run's codes (bytes) and parameters (groups) begin.
    """

    row: int
    count: int
    width: int
    code: int
    group: int


@dataclass(frozen=True)
class OutputQuantizedWeight:
    """A matrix (out, in) quantized along outputs; ``ops.linear`` takes it in place of a tensor.

    codes (bytes,) uint8, params (groups, 2) float16; blocks: rows of the tensors it is made of; dtype: what values are
    rounded to.
    """

    codes: Tensor
    params: Tensor
    shape: tuple[int, int]
    blocks: tuple[int, ...]
    compression: Compression
    dtype: torch.dtype

    @staticmethod
    def of(weight: Tensor, compression: Compression, blocks: tuple[int, ...] = ()) -> OutputQuantizedWeight:
        """Quantize a matrix (out, in)."""
        outputs, inputs = weight.shape
        blocks = blocks or (outputs,)
        parts = [p for block in weight.split(blocks) for p in quantize_strips(block, compression)]
        codes, params = (torch.cat(each) for each in zip(*parts, strict=True))
        return OutputQuantizedWeight(codes, params, (outputs, inputs), blocks, compression, weight.dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """Output rows start to stop, dequantized: (stop - start, in)."""
        dtype = dtype or self.dtype
        if out is None:
            out = torch.empty((stop - start, self.shape[1]), dtype=dtype, device=self.codes.device)
        for first, strips in self._strips(start, stop, dtype):
            count, _, width = strips.shape
            low, high = max(start, first), min(stop, first + count * width)
            target, values = out[low - start : high - start], strips.transpose(1, 2)
            if high - low == count * width:
                target.unflatten(0, (count, width)).copy_(values)
            else:
                target.copy_(values.flatten(0, 1)[low - first : high - first])
        return out

    def dequantize(self) -> Tensor:
        """The whole matrix (out, in)."""
        return self.rows(0, self.shape[0])

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (N, in) times this transposed plus bias: a product with each strip as it lies, so nothing is transposed."""
        assert self.dtype == x.dtype, (self.dtype, x.dtype)
        y = x.new_empty((x.shape[0], self.shape[0]))
        for first, strips in self._strips(0, self.shape[0], self.dtype):
            count, _, width = strips.shape
            into = y[:, first : first + count * width].unflatten(1, (count, width))
            into.copy_(torch.matmul(x, strips).transpose(0, 1))
        return y if bias is None else y.add_(bias)

    @cached_property
    def _runs(self) -> tuple[_Run, ...]:
        runs, size, inputs = [], self.compression.group_size, self.shape[1]
        row = code = group = 0
        for block in self.blocks:
            full, rest = divmod(block, size)
            for count, width in ((full, size), (1, rest)):
                if count and width:
                    runs.append(_Run(row, count, width, code, group))
                    row += count * width
                    code += count * inputs * self.compression.code_bytes(width)
                    group += count * inputs
        return tuple(runs)

    def _strips(self, start: int, stop: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Strips that hold rows start to stop, some at a time: (their first row, values (strips, in, width))."""
        inputs = self.shape[1]
        room = CPU_BYTES if self.codes.device.type == "cpu" else DEVICE_BYTES
        for run in self._runs:
            size = self.compression.code_bytes(run.width)
            low = max(0, start - run.row) // run.width
            high = min(run.count, -(-(stop - run.row) // run.width))
            step = max(1, room // (inputs * run.width * dtype.itemsize))
            for strip in range(low, high, step):
                count = min(step, high - strip)
                codes = self.codes[run.code + strip * inputs * size :][: count * inputs * size]
                params = self.params[run.group + strip * inputs :][: count * inputs]
                values = dequantize(
                    codes.view(count, inputs, size),
                    params.view(count, inputs, 1, 2),
                    run.width,
                    self.compression,
                    dtype,
                )
                yield run.row + strip * run.width, values


def quantize_strips(block: Tensor, compression: Compression) -> Iterator[tuple[Tensor, Tensor]]:
    """A block (rows, in) -> codes (bytes,) and params (groups, 2) of its strips in order, in up to two pieces.

    Rows may be given in several calls, as long as all but the last give whole strips.
    """
    assert compression.along is Along.OUTPUTS, compression
    whole = block.shape[0] // compression.group_size * compression.group_size
    for part in (block[:whole], block[whole:]):
        if part.shape[0]:
            width = min(compression.group_size, part.shape[0])
            strips = part.unflatten(0, (-1, width)).transpose(1, 2).contiguous()
            codes, params = quantize(strips, compression)
            yield codes.flatten(), params.flatten(0, 2)
