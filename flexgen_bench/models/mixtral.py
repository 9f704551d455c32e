"""Mixtral (Jiang et al. 2024): Mistral with eight experts in every layer's place of an MLP, two of them for a token.

Options of ``ModelShape``: those of ``mistral.py``, and experts, experts_per_token; ffn_size is an expert's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.inventory import Names, PartNames
from flexgen_bench.models.llama_like import LAYER_NAMES, LlamaLike, window_of, window_options
from flexgen_bench.models.mixture import EXPERTS, PER_TOKEN, STACKED_NAMES, expert_counts
from flexgen_bench.models.parts import Experts, Router, Scoring

_EXPERT = "block_sparse_moe.experts.{}."
_NAMES: PartNames = {
    "router": "block_sparse_moe.gate",
    "experts.gate_up": (_EXPERT + "w1", _EXPERT + "w3"),
    "experts.down": _EXPERT + "w2",
}


class Mixtral(LlamaLike):
    name = "mixtral"
    architecture = "MixtralForCausalLM"
    model_type = "mixtral"
    names = Names(LAYER_NAMES | _NAMES)
    other_names: ClassVar[tuple[Names, ...]] = (Names(LAYER_NAMES | STACKED_NAMES),)
    other_prefixes = ("model.", "")
    reads = ("sliding_window", "num_local_experts")
    positions = 4096 * 32
    kv_heads = 8
    eps = 1e-5
    theta = 1e6

    def extra_options(self, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        counts = expert_counts(config, "num_local_experts", 8, 2)
        return window_options({}, layers, window_of(config, None), []) | counts

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        options = shape.options
        return super().config_from_shape(shape) | {
            "sliding_window": options.get("window"),
            "num_local_experts": options[EXPERTS],
            "num_experts_per_tok": options[PER_TOKEN],
        }

    def mlp(self, shape: ModelShape, number: int) -> Experts:
        options = shape.options
        router = Router(Scoring.SOFTMAX, int(options[PER_TOKEN]), renormalised=True)
        return Experts(int(options[EXPERTS]), self.dense_mlp(shape, shape.ffn_size), router)


FAMILIES = (Mixtral(),)
