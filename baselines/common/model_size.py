"""How large the parts of a model are: values of its matrices, by where they are used."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.models.registry import family


@dataclass(frozen=True)
class ModelSize:
    """A model's sizes in values; ``bytes_of`` turns them into bytes of the model's dtype."""

    shape: ModelShape
    dtype: DType

    @cached_property
    def attention_values(self) -> int:
        """Q, K, V and output of one layer."""
        s = self.shape
        return s.hidden_size * s.head_dim * 2 * (s.num_heads + s.num_kv_heads)

    @cached_property
    def mlp_values(self) -> int:
        """The other matrices of one layer (two in OPT, three in gated families)."""
        layer = family(self.shape.family).inventory(self.shape).layers[0]
        matrices = sum(t.spec.num_values for t in layer if len(t.spec.shape) > 1)
        return matrices - self.attention_values

    @property
    def table_values(self) -> int:
        """The token table, and so the head's matrix."""
        return self.shape.vocab_size * self.shape.hidden_size

    @property
    def position_values(self) -> int:
        return self.shape.max_positions * self.shape.hidden_size if self.shape.family == "opt" else 0

    @property
    def layer_values(self) -> int:
        return self.attention_values + self.mlp_values

    @property
    def weight_bytes(self) -> int:
        """Of the whole model; a tied table counts once."""
        tables = self.table_values * (1 if self.shape.tied_embeddings else 2)
        values = self.shape.num_layers * self.layer_values + tables + self.position_values
        return values * self.dtype.bytes

    @property
    def largest_matrix_bytes(self) -> int:
        return self.shape.hidden_size * self.shape.ffn_size * self.dtype.bytes

    def bytes_of(self, values: float) -> float:
        return values * self.dtype.bytes

    @property
    def kv_bytes_per_token_layer(self) -> int:
        return self.shape.kv_values_per_token_layer * self.dtype.bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return self.shape.num_layers * self.kv_bytes_per_token_layer
