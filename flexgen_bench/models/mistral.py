"""Mistral (Jiang et al. 2023): Llama's form, with a window on every layer in the first release and none in later ones.

Options of ``ModelShape``: those of ``llama_like.py``; no biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.llama_like import LlamaLike, window_of, window_options


class Mistral(LlamaLike):
    name = "mistral"
    architecture = "MistralForCausalLM"
    model_type = "mistral"
    reads = ("sliding_window",)
    positions = 4096 * 32
    kv_heads = 8

    def extra_options(self, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        return window_options({}, layers, window_of(config, 4096), [])

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        window = shape.options.get("window")
        return super().config_from_shape(shape) | {"sliding_window": window}


FAMILIES = (Mistral(),)
