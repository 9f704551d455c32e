"""Seconds that PyTorch's eager operators take for the parts of a layer: every operator reads its inputs and writes its
outputs.

Formulas count floating point operations against the profile's matrix rate, and bytes against its memory rate; no fused
attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from baselines.common.model_size import ModelSize
from flexgen_bench.core.rates import SiteRates

# Passes over (tokens, hidden) values in one layer beside the products: two norms (4), scaling of Q (2), Q, K, V brought
# into the order of heads (6), the attention's result brought back (2), two residual additions (6); over (tokens, ffn):
# the activation (2).
HIDDEN_PASSES, FFN_PASSES = 20, 2


@dataclass(frozen=True)
class EagerCompute:
    """Seconds on one site, of one layer and ``batch`` sequences.

    score_passes: passes over a prompt's (heads, tokens, tokens) attention scores between writing them and having read
    them for the last time. decode_attention_share: bytes/s of KV cache that decode attention gets through, as a share
    of the memory rate.
    """

    size: ModelSize
    site: SiteRates
    score_passes: float
    decode_attention_share: float

    def product(self, rows: float, values: float, width: float, read: float | None = None) -> float:
        """``rows`` rows times a matrix of ``values`` values: bound by arithmetic, or by reading the matrix. read:
        values that are read, if more."""
        flops = 2 * rows * values / self.site.torch_matrix_rate(self.size.dtype, rows, width)
        return max(flops, self.size.bytes_of(values if read is None else read) / self.site.memory)

    def attention_products(self, rows: float) -> float:
        """Q, K, V and output projections."""
        return self.product(rows, self.size.attention_values, self.size.shape.hidden_size)

    def mlp_products(self, rows: float) -> float:
        width = math.sqrt(self.size.shape.hidden_size * self.size.shape.ffn_size)
        met, read = self.size.mlp_values_met(rows)
        return self.product(rows, met, width, read)

    def head_products(self, rows: float) -> float:
        return self.product(rows, self.size.table_values, math.sqrt(self.size.table_values))

    def attention_elementwise(self, rows: float) -> float:
        passes = HIDDEN_PASSES - 5  # all but the MLP's norm and residual addition
        values = rows * self.size.shape.hidden_size * passes
        return self.size.bytes_of(values) / self.site.memory

    def mlp_elementwise(self, rows: float) -> float:
        shape = self.size.shape
        values = rows * (5 * shape.hidden_size + FFN_PASSES * self.size.inner_width)
        return self.size.bytes_of(values) / self.site.memory

    def prefill_attention(self, batch: float, tokens: int) -> float:
        """Scores and weighted values of a prompt, the whole square of them."""
        shape, size = self.size.shape, self.size
        square = batch * shape.num_heads * tokens * tokens
        rate = self.site.torch_matrix_rate(size.dtype, tokens, tokens)
        flops = 4 * square * shape.head_dim / rate
        return flops + size.bytes_of(self.score_passes * square) / self.site.memory

    def decode_attention(self, batch: float, context: float) -> float:
        """One new token for each sequence over ``context`` cached ones."""
        kv = batch * context * self.size.kv_bytes_per_token_layer
        return kv / (self.decode_attention_share * self.site.memory)
