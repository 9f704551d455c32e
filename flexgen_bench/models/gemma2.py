"""Gemma 2 (Gemma Team 2024): scores and logits under soft caps, norms before and after attention and MLP, a window on
every other layer.

Options of ``ModelShape``: those of ``llama_like.py``, and query_scalar (scores are divided by its root),
logit_soft_cap, attention_soft_cap.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.family import config_number, must_be
from flexgen_bench.models.inventory import Names
from flexgen_bench.models.llama_like import LAYER_NAMES, LlamaLike, window_config, window_of, window_options
from flexgen_bench.models.parts import Embedding, Head, Layer, NormKind

LOGITS, SCORES = "final_logit_softcapping", "attn_logit_softcapping"
_SCALAR = "query_pre_attn_scalar"


class Gemma2(LlamaLike):
    name = "gemma2"
    architecture = "Gemma2ForCausalLM"
    model_type = "gemma2"
    reads: ClassVar[Collection[str]] = ("sliding_window", "layer_types", LOGITS, SCORES)
    names = Names(
        LAYER_NAMES
        | {
            "attention_out_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_out_norm": "post_feedforward_layernorm",
        }
    )
    norm_kind = NormKind.RMS_AROUND_ONE
    bias_keys = ("attention_bias",)
    positions, head_dim, kv_heads, tied = 8192, 256, 4, True
    activation, activation_key = "gelu_pytorch_tanh", "hidden_activation"
    logit_cap: float | None = 30.0
    score_cap: float | None = 50.0
    pattern = 2  # every so many layers one without a window

    def extra_options(self, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        must_be(config, self.name, use_bidirectional_attention=(None, False))
        pattern = self.pattern_of(config)
        full = [number for number in range(layers) if (number + 1) % pattern == 0]
        return {
            "query_scalar": config_number(config, _SCALAR, 256),
            "logit_soft_cap": self.cap(config, LOGITS, self.logit_cap),
            **({} if self.score_cap is None else {"attention_soft_cap": self.cap(config, SCORES, self.score_cap)}),
            **window_options(config, layers, window_of(config, 4096), full),
        }

    def pattern_of(self, config: Mapping[str, Any]) -> int:
        return self.pattern

    def cap(self, config: Mapping[str, Any], key: str, default: float | None) -> float | None:
        return config_number(config, key, None) if key in config else default

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        options = shape.options
        return (
            super().config_from_shape(shape)
            | window_config(shape)
            | {
                _SCALAR: options.get("query_scalar", 256),
                LOGITS: options.get("logit_soft_cap", self.logit_cap),
                SCORES: options.get("attention_soft_cap", self.score_cap),
            }
        )

    def embedding(self, shape: ModelShape) -> Embedding:
        return Embedding(shape.hidden_size, scale=shape.hidden_size**0.5)

    def head(self, shape: ModelShape) -> Head:
        cap = shape.options.get("logit_soft_cap", self.logit_cap)
        return Head(self.norm(shape), soft_cap=cap)

    def layer(self, shape: ModelShape, has_window: bool) -> Layer:
        layer, norm = super().layer(shape, has_window), self.norm(shape)
        cap = shape.options.get("attention_soft_cap", self.score_cap)
        attention = replace(
            layer.attention,
            scale=float(shape.options.get("query_scalar", 256)) ** -0.5,
            mod=replace(layer.attention.mod, soft_cap=cap),
        )
        return replace(layer, attention=attention, attention_out_norm=norm, mlp_out_norm=norm)


FAMILIES = (Gemma2(),)
