"""MXFP4, in which some checkpoints are published: exact, since it is what their weights are.

Open Compute Project, Microscaling Formats (MX) Specification 1.0 (2023): 32 values share a scale, a power of two in a
byte (E8M0: 2^(byte - 127)), and have four bits each (E2M1: a sign, two bits of exponent, one of mantissa).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from flexgen_bench.core.compression import Along, Compression

# What the codes 0 .. 15 stand for (section 5.3.3).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
EXPONENT_BIAS = 127


@dataclass(frozen=True)
class Microscaling:
    """How rows of MXFP4 lie, with the words of ``Compression``: codes as there (a byte holds values j and j + 16 of its
    group), parameters one byte for each group. Rows have whole groups."""

    bits: ClassVar[int] = 4
    group_size: ClassVar[int] = 32
    along: ClassVar[Along] = Along.INPUTS

    def groups(self, row: int) -> int:
        """Groups in a row of ``row`` values."""
        return row // self.group_size

    def code_bytes(self, row: int) -> int:
        """Bytes of a row's codes."""
        return row // 2

    def row_bytes(self, row: int) -> int:
        """Bytes of a row: codes and scales."""
        return self.code_bytes(row) + self.groups(row)

    def matrix_bytes(self, blocks: Sequence[int], columns: int) -> tuple[int, int]:
        """Bytes of all codes and of all parameters of a matrix (out, in = ``columns``) made of blocks of so many
        rows."""
        return sum(blocks) * self.code_bytes(columns), sum(blocks) * self.groups(columns)

    def __str__(self) -> str:
        return "mxfp4"


MXFP4 = Microscaling()
# How the codes of a matrix and their parameters are to be read.
Codes = Compression | Microscaling
