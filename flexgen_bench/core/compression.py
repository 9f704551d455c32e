"""What may change results: group-wise compression of weights and KV cache, and sparse attention on values.

A policy's other choices (placement, schedule, batch shape) never change a token; these do, so they are kept apart and
every record and table names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from flexgen_bench.core.codec import OMITTED
from flexgen_bench.core.errors import UserError, unknown_choice

BITS = (3, 4, 8)
ACTIVATION_BITS = 8
# A group's scale and smallest value, in float16 each (the paper's choice: 4.5 bits per value at 4 bits, group 64).
GROUP_PARAMETER_BYTES = 4


class Along(StrEnum):
    """In which direction the values of a group of a weight (out, in) follow each other."""

    INPUTS = "inputs"  # within a row: all of them belong to one output
    OUTPUTS = "outputs"  # within a column: the original's layout


class Scales(StrEnum):
    """How a group's scale and smallest value are found. What is stored, and how it is unpacked, is the same."""

    MINMAX = "minmax"  # from its smallest and its largest value (the paper's)
    MSE = "mse"  # searched for the least squared error: outliers may be cut off
    CALIBRATED = (
        "calibrated"  # the same, an input's errors counted by how large it was on a text (accuracy/run/importance.py)
    )


@dataclass(frozen=True)
class Compression:
    """Group-wise asymmetric quantization: value = smallest of its group + code * scale of its group.

    Groups are runs of ``group_size`` values along the last dimension (the last group of a row may be shorter); a row's
    codes are packed without gaps between groups, ``bits`` bits each. ``along`` outputs: of a weight (out, in), the runs
    go down its columns. What has a row for each token is kept in more bits (``of_vocabulary``).
    """

    bits: int
    group_size: int = 64
    # Left out where they are the usual ones, as in records older than them.
    along: Along = field(default=Along.INPUTS, metadata=OMITTED)
    scales: Scales = field(default=Scales.MINMAX, metadata=OMITTED)

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UserError("compression.bits", self.bits, f"one of {', '.join(map(str, BITS))}, or none")
        size = self.group_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 8 or size % 8:
            raise UserError("compression.group_size", size, "a multiple of 8 (groups start at whole bytes)")
        choices: dict[str, type[StrEnum]] = {"along": Along, "scales": Scales}
        for name, enum in choices.items():
            value = getattr(self, name)
            if value not in list(enum):
                raise unknown_choice(f"compression.{name}", value, enum)
            object.__setattr__(self, name, enum(value))
        if self.along is Along.OUTPUTS and self.scales is Scales.CALIBRATED:
            raise UserError(
                "compression.scales",
                "calibrated",
                "minmax or mse for groups along outputs",
                "All values of such a group meet the same input, so calibration would change nothing.",
            )

    @property
    def of_vocabulary(self) -> Compression:
        """How matrices with a row for each token are compressed (token table, head): 8 bits, within a row.

        At 4 bits SmolLM2's table alone adds 0.107 to the log-loss, a third of what all layers add, for 14 of 90 MB; at
        8 bits
        0.0004 (docs/notes/accuracy_quantization.md). In large models it is 1 % of the weights. Rows of a table are
        looked up one by one.
        """
        return Compression(max(BITS), self.group_size)

    def matrix_bytes(self, blocks: Sequence[int], columns: int) -> tuple[int, int]:
        """Bytes of all codes and of all parameters of a matrix (out, in = ``columns``) made of blocks of so many
        rows."""
        if self.along is Along.INPUTS:
            rows = sum(blocks)
            codes, groups = rows * self.code_bytes(columns), rows * self.groups(columns)
        else:
            codes = columns * sum(self.code_bytes(rows) for rows in blocks)
            groups = columns * sum(self.groups(rows) for rows in blocks)
        return codes, groups * GROUP_PARAMETER_BYTES

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
        """``4-bit``; what differs from the usual is named, as in ``4-bit/32/outputs/mse``: equal names mean equal
        results."""
        unusual = [
            str(getattr(self, f.name)) for f in fields(self) if f.name != "bits" and getattr(self, f.name) != f.default
        ]
        return "/".join([f"{self.bits}-bit", *unusual])

    @staticmethod
    def parse(value: object, group_size: int = 64) -> Compression | None:
        """From a configuration: none, bits (``4``), a name as it is printed (``4-bit/32/outputs/mse``), or a mapping of
        fields.

        group_size: where none is named. Raises UserError for anything else; its field is ``compression`` or one of its
        fields.
        """
        if value is None or isinstance(value, Compression):
            return value
        if isinstance(value, str):
            value = _fields_of(value)
        if isinstance(value, Mapping):
            unknown = [k for k in value if k not in Compression.__dataclass_fields__]
            if unknown:
                raise unknown_choice("compression", unknown[0], Compression.__dataclass_fields__)
            if "bits" not in value:
                raise UserError("compression", dict(value), "a mapping with the key bits")
            return Compression(**{"group_size": group_size, **value})
        return Compression(value, group_size)  # type: ignore[arg-type]  # it checks, and says what is allowed


def _fields_of(name: str) -> dict[str, Any]:
    """``4-bit/32/outputs/mse`` -> its fields; parts after the first come in any order."""
    bits, *rest = name.strip().split("/")
    number = bits.removesuffix("-bit").removesuffix("bit")
    if not number.isdecimal():
        raise UserError("compression", name, "bits (4), or a name such as 4-bit, 4-bit/32 or 4-bit/outputs/mse")
    named: dict[str, Any] = {"bits": int(number)}
    for part in rest:
        if part.isdecimal():
            key = "group_size"
        elif part in list(Along):
            key = "along"
        elif part in list(Scales):
            key = "scales"
        else:
            raise unknown_choice("compression", part, [*Along, *Scales])
        if key in named:
            raise UserError("compression", name, f"a name with one {key}")
        named[key] = int(part) if key == "group_size" else part
    return named


@dataclass(frozen=True)
class Lossy:
    """Everything that makes results differ from the uncompressed model's. The default changes nothing.

    weights, kv_cache: their compression, independent of each other. A cache's is plain min-max within a head's values:
    it is compressed token by token, while others wait.
    value_share: decode attention uses only this share of the value rows, those with the largest weights (the last token
    always).
    activations: bits that what 4-bit weights are multiplied with is quantized to, in groups as long as theirs
    (kernels/eight_bit.py): products in whole numbers, on a processor. The head and other matrices with a row for each
    token are multiplied as they are.
    """

    weights: Compression | None = None
    kv_cache: Compression | None = None
    value_share: float = 1.0
    activations: int | None = field(default=None, metadata=OMITTED)

    def __post_init__(self) -> None:
        share = self.value_share
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            raise UserError("value_share", share, "a share above 0 and at most 1", "The paper uses 0.1.")
        cache = self.kv_cache
        if cache is not None and cache != Compression(cache.bits, cache.group_size):
            raise UserError("kv_cache", str(cache), "bits and a group size", "along and scales are for weights.")
        if self.activations is None:
            return
        if isinstance(self.activations, bool) or self.activations != ACTIVATION_BITS:
            raise UserError("activations", self.activations, f"{ACTIVATION_BITS} bits, or none")
        if self.weights is None or self.weights.bits != 4 or self.weights.along is not Along.INPUTS:
            raise UserError(
                "activations",
                self.activations,
                f"none with {self.weights or 'plain'} weights",
                "Only 4-bit weights with groups along inputs have such products: weights=4.",
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
        if self.activations:
            parts.append(f"{self.activations}-bit activations")
        return ", ".join(parts) or "exact"


EXACT = Lossy()
