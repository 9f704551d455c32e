"""What decode attention reads: the pieces in which a KV cache lies, and which slots of its first piece hold tokens.

S sequences, G KV heads, T tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexgen_bench.core.compression import Compression
from flexgen_bench.kernels.quantization import dequantize


@dataclass(frozen=True)
class PlainSegment:
    """Keys and values (S, G, T, D) each; free strides, but a row of D values is contiguous."""

    k: Tensor
    v: Tensor

    @property
    def sequences(self) -> int:
        return self.k.shape[0]

    @property
    def heads(self) -> int:
        return self.k.shape[1]

    @property
    def tokens(self) -> int:
        return self.k.shape[2]

    def part(self, start: int, stop: int) -> PlainSegment:
        """The same of some sequences; nothing is copied."""
        return PlainSegment(self.k[start:stop], self.v[start:stop])

    def keys(self, dtype: torch.dtype) -> Tensor:
        """(S, G, T, D)."""
        return self.k.to(dtype)

    def values(self, dtype: torch.dtype) -> Tensor:
        """(S, G, T, D)."""
        return self.v.to(dtype)


@dataclass(frozen=True)
class PackedSegment:
    """Quantized keys (index 0) and values (index 1), laid out as kernels/quantization.py says.

    codes (2, S, G, T, C) uint8 with C = compression.code_bytes(head_dim), params (2, S, G, T, groups, 2) float16.
    """

    codes: Tensor
    params: Tensor
    compression: Compression
    head_dim: int

    @property
    def sequences(self) -> int:
        return self.codes.shape[1]

    @property
    def heads(self) -> int:
        return self.codes.shape[2]

    @property
    def tokens(self) -> int:
        return self.codes.shape[3]

    def part(self, start: int, stop: int) -> PackedSegment:
        """The same of some sequences; nothing is copied."""
        codes, params = self.codes[:, start:stop], self.params[:, start:stop]
        return PackedSegment(codes, params, self.compression, self.head_dim)

    def keys(self, dtype: torch.dtype) -> Tensor:
        """(S, G, T, D), all dequantized."""
        return self._dequantized(0, dtype)

    def values(self, dtype: torch.dtype) -> Tensor:
        """(S, G, T, D), all dequantized."""
        return self._dequantized(1, dtype)

    def _dequantized(self, which: int, dtype: torch.dtype) -> Tensor:
        return dequantize(self.codes[which], self.params[which], self.head_dim, self.compression, dtype)


Segment = PlainSegment | PackedSegment


@dataclass(frozen=True)
class Padding:
    """Which slots of the FIRST segment hold a token: for sequence s those below lengths[s].

    lengths (S,) int32 on the host; mask (S, T) bool on the compute device, True where there is a token. The same,
    twice: neither has to be fetched from the other's memory. Other slots may hold any finite numbers.
    of_all: of the slots of all segments, counted through, instead.
    """

    lengths: Tensor
    mask: Tensor
    of_all: bool = False

    @staticmethod
    def of(lengths: Tensor, tokens: int, device: torch.device, of_all: bool = False) -> Padding | None:
        """Of prompts of these lengths (S,) in slots for ``tokens``; None if all slots are full."""
        lengths = lengths.to("cpu", torch.int32)
        mask = torch.arange(tokens, dtype=torch.int32)[None, :] < lengths[:, None]
        return None if bool(mask.all()) else Padding(lengths, mask.to(device), of_all)

    def part(self, start: int, stop: int) -> Padding:
        """The same of some sequences."""
        return Padding(self.lengths[start:stop], self.mask[start:stop], self.of_all)
