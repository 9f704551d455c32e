"""How large the parts of a model are: values of its matrices, by where they are used."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.models.parts import Experts, Layer
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
        """The other matrices of one layer (two in OPT, three in gated families, and those of all experts), of layers
        that differ the mean."""
        layers = family(self.shape.family).inventory(self.shape).layers
        matrices = sum(t.spec.num_values for layer in layers for t in layer if len(t.spec.shape) > 1)
        return matrices // len(layers) - self.attention_values

    def mlp_values_met(self, tokens: float) -> tuple[float, float]:
        """Of ``mlp_values`` those that a token is multiplied with, and those that any of ``tokens`` is, if each expert
        is as likely as another: E (1 - (1 - k/E)^n) of a layer's E experts, k for a token."""
        idle = unread = 0.0
        for layer in self._layers:
            if isinstance(layer.mlp, Experts):
                share = layer.mlp.router.top_k / layer.mlp.count
                idle += layer.idle_values
                unread += layer.mlp.count * layer.mlp.expert.num_values(layer.hidden) * (1 - share) ** tokens
        count = len(self._layers)
        return self.mlp_values - idle / count, self.mlp_values - unread / count

    @cached_property
    def inner_width(self) -> int:
        """Of what a token is turned into between an MLP's matrices, in all its experts."""
        widths = [
            layer.mlp.expert.width * layer.mlp.router.top_k + (layer.mlp.shared.width if layer.mlp.shared else 0)
            if isinstance(layer.mlp, Experts)
            else layer.mlp.width
            for layer in self._layers
        ]
        return max(widths)

    @cached_property
    def _layers(self) -> tuple[Layer, ...]:
        return family(self.shape.family).decoder(self.shape).layers

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
        """transformers keeps one matrix of all experts of a layer in one tensor, gates and what they gate together."""
        experts = (layer.mlp for layer in self._layers if isinstance(layer.mlp, Experts))
        stacks = (e.count * (2 if e.expert.gated else 1) * e.expert.width for e in experts)
        return self.shape.hidden_size * max(self.shape.ffn_size, *stacks, 0) * self.dtype.bytes

    def bytes_of(self, values: float) -> float:
        return values * self.dtype.bytes

    @property
    def kv_bytes_per_token_layer(self) -> int:
        return self.shape.kv_values_per_token_layer * self.dtype.bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return self.shape.num_layers * self.kv_bytes_per_token_layer
