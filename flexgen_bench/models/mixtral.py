"""Mixtral (Jiang et al. 2024): Mistral's form with experts in every layer, weighed among those that were chosen.

Options of ``ModelShape``: those of ``mixture.py`` without expert_size, renormalised and dense_layers; window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.inventory import Names, PartNames
from flexgen_bench.models.llama_like import LAYER_NAMES, window_of, window_options
from flexgen_bench.models.mixture import MixtureLike

_EXPERT = "block_sparse_moe.experts.{}."
_NAMES: PartNames = {
    "router": "block_sparse_moe.gate",
    "experts.gate_up": (_EXPERT + "w1", _EXPERT + "w3"),
    "experts.down": _EXPERT + "w2",
}


class Mixtral(MixtureLike):
    name = "mixtral"
    architecture = "MixtralForCausalLM"
    model_type = "mixtral"
    names = Names(LAYER_NAMES | _NAMES)
    count_keys = ("num_local_experts", "num_experts")
    reads = ("sliding_window", *count_keys)
    experts, per_token = 8, 2
    positions = 4096 * 32
    kv_heads = 8
    eps = 1e-5
    theta = 1e6

    def extra_options(self, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        return super().extra_options(config, layers) | window_options({}, layers, window_of(config, None), [])

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        return super().config_from_shape(shape) | {"sliding_window": shape.options.get("window")}


FAMILIES = (Mixtral(),)
