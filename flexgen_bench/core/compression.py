"""What may change results: group-wise compression of weights and KV cache, and sparse attention on values.

A policy's other choices (placement, schedule, batch shape) never change a token; these do, so they are kept apart and
every record and table names them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from flexgen_bench.core.errors import UserError

BITS = (3, 4, 8)
# A group's scale and smallest value, in float16 each (the paper's choice: 4.5 bits per value at 4 bits, group 64).
GROUP_PARAMETER_BYTES = 4


@dataclass(frozen=True)
class Compression:
    """Group-wise asymmetric quantization: value = smallest of its group + code * scale of its group.

    Groups are runs of ``group_size`` values along the last dimension (the last group of a row may be shorter); a row's codes
    are packed without gaps between groups, ``bits`` bits each.
    """

    bits: int
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UserError(
                "compression.bits", self.bits, f"one of {', '.join(map(str, BITS))}, or none"
            )
        size = self.group_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 8 or size % 8:
            raise UserError(
                "compression.group_size", size, "a multiple of 8 (groups start at whole bytes)"
            )

    @property
    def levels(self) -> int:
        """Distinct codes."""
        return 1 << self.bits

    def groups(self, row: int) -> int:
        """Groups in a row of ``row`` values."""
        return -(-row // self.group_size)

    def code_bytes(self, row: int) -> int:
        """Bytes of a row's codes: whole groups, and a last one that is filled up to a multiple of 8 values."""
        return -(-row // 8) * self.bits

    def row_bytes(self, row: int) -> int:
        """Bytes of a row: codes, scales and smallest values."""
        return self.code_bytes(row) + self.groups(row) * GROUP_PARAMETER_BYTES

    def __str__(self) -> str:
        """``4-bit``; a group size other than the usual one is named, so that equal names mean equal results."""
        usual = self.group_size == Compression.group_size
        return f"{self.bits}-bit" if usual else f"{self.bits}-bit/{self.group_size}"

    def to_dict(self) -> dict[str, Any]:
        return {"bits": self.bits, "group_size": self.group_size}

    @staticmethod
    def from_dict(data: dict[str, Any] | None) -> Compression | None:
        return None if data is None else Compression(**data)


@dataclass(frozen=True)
class Lossy:
    """Everything that makes results differ from the uncompressed model's. The default changes nothing.

    weights, kv_cache: their compression, independent of each other.
    value_share: decode attention uses only this share of the value rows, those with the largest weights (the last token always).
    """

    weights: Compression | None = None
    kv_cache: Compression | None = None
    value_share: float = 1.0

    def __post_init__(self) -> None:
        share = self.value_share
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            raise UserError(
                "value_share", share, "a share above 0 and at most 1", "The paper uses 0.1."
            )

    @property
    def is_exact(self) -> bool:
        return self == EXACT

    @property
    def changed(self) -> tuple[str, ...]:
        """The names of the fields that change something."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != f.default)

    def __str__(self) -> str:
        parts = [f"{self.weights} weights"] if self.weights else []
        parts += [f"{self.kv_cache} KV"] if self.kv_cache else []
        if self.value_share < 1:
            parts.append(f"{self.value_share:.0%} of V")
        return ", ".join(parts) or "exact"

    def to_dict(self) -> dict[str, Any]:
        return {
            "weights": self.weights and self.weights.to_dict(),
            "kv_cache": self.kv_cache and self.kv_cache.to_dict(),
            "value_share": self.value_share,
        }

    @staticmethod
    def from_dict(data: dict[str, Any] | None) -> Lossy:
        if data is None:
            return EXACT
        return Lossy(
            Compression.from_dict(data.get("weights")),
            Compression.from_dict(data.get("kv_cache")),
            data.get("value_share", 1.0),
        )


EXACT = Lossy()
