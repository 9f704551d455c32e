"""Qwen2 and Qwen2.5 (Yang et al. 2024): biases on queries, keys and values alone. Qwen3 (2025): a norm over each head's
queries and keys.

Options of ``ModelShape``: those of ``llama_like.py``; Qwen3 has attention_bias, neither has mlp_bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.family import config_flag
from flexgen_bench.models.llama_like import LlamaLike, window_config, window_of, window_options
from flexgen_bench.models.parts import Layer


class Qwen2(LlamaLike):
    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    model_type = "qwen2"
    reads = ("sliding_window", "layer_types")
    qkv_bias = True
    out_bias: ClassVar[bool | None] = False
    positions = 32768
    kv_heads = 32

    def extra_options(self, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        window = window_of(config, 4096)
        if not config_flag(config, "use_sliding_window", False):
            window = None
        first = config.get("max_window_layers", 28)
        return window_options(config, layers, window, list(range(min(layers, int(first)))))

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        windows = window_config(shape)
        has_window = windows["sliding_window"] is not None
        return super().config_from_shape(shape) | windows | {"use_sliding_window": has_window}


class Qwen3(Qwen2):
    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    model_type = "qwen3"
    bias_keys = ("attention_bias",)
    qkv_bias, out_bias = False, None
    head_dim = 128

    def layer(self, shape: ModelShape, has_window: bool) -> Layer:
        layer = super().layer(shape, has_window)
        attention = replace(layer.attention, qk_norm=self.norm(shape))
        return replace(layer, attention=attention)


FAMILIES = (Qwen2(), Qwen3())
