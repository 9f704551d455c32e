"""The shape of a model: everything about it except its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from flexgen_bench.core.errors import UserError


class DType(StrEnum):
    """Element type of weights, activations and KV cache."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def bytes(self) -> int:
        return 4 if self is DType.FLOAT32 else 2


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer's dimensions, in the field's usual names.

    ``options`` holds what only one family knows (OPT's post-norm, Llama's rotary base); the family's file
    in ``models/`` documents and checks its own options.
    """

    name: str
    family: str
    num_layers: int  # L
    hidden_size: int
    num_heads: int  # H, query heads
    num_kv_heads: int  # key/value heads; equal to num_heads unless grouped-query
    head_dim: int  # D
    ffn_size: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        for name in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "ffn_size",
            "vocab_size",
            "max_positions",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"model.{name}", value, "an integer of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                "model.num_kv_heads",
                self.num_kv_heads,
                f"a divisor of num_heads = {self.num_heads} (each KV head serves a group of query heads)",
            )

    @property
    def kv_values_per_token_layer(self) -> int:
        """Elements of K and V together that one token leaves in one layer."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class TensorSpec:
    """One weight: its name in the packed layer and its shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_values(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count
