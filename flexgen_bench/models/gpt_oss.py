"""gpt-oss (OpenAI 2025): experts in MXFP4 with biases and a clamped gate, a sink for each query head, a window on every
other layer.

Options of ``ModelShape``: those of ``mixture.py`` without renormalised; window, full_layers; gate_limit, gate_alpha
(``parts.Clamp``); packing ("mxfp4": of experts, as the checkpoint has it; None: plain numbers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.microscaling import MXFP4
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.family import config_number
from flexgen_bench.models.inventory import Names, PartNames
from flexgen_bench.models.llama_like import LAYER_NAMES, window_config, window_of, window_options
from flexgen_bench.models.mixture import MixtureLike
from flexgen_bench.models.parts import MLP, Clamp, Experts, Layer, Router
from flexgen_bench.models.rope import Rope

_LIMIT, _ALPHA, _QUANTIZATION = "swiglu_limit", "swiglu_alpha", "quantization_config"
_NAMES: PartNames = LAYER_NAMES | {"sinks": "self_attn.sinks", "router": "mlp.router"}
_STACKS: PartNames = {"experts.gate_up": "mlp.experts.gate_up_proj", "experts.down": "mlp.experts.down_proj"}
_EXPERTS: PartNames = {"experts.gate_up": "mlp.experts.{}.gate_up_proj", "experts.down": "mlp.experts.{}.down_proj"}
# Where a config says nothing.
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


class GptOss(MixtureLike):
    name = "gpt_oss"
    architecture = "GptOssForCausalLM"
    model_type = "gpt_oss"
    names = Names(_NAMES | _EXPERTS)
    other_names: ClassVar[tuple[Names, ...]] = (Names(_NAMES | _STACKS),)
    transposed = ("experts.gate_up_proj", "experts.down_proj")
    count_keys = ("num_local_experts", "num_experts")
    reads = ("sliding_window", "layer_types", *count_keys)
    experts, per_token = 128, 4
    bias_keys, qkv_bias = ("attention_bias",), True
    positions, theta, eps = 131072, 150000.0, 1e-5
    head_dim, kv_heads = 64, 8

    def rope(self, config: Mapping[str, Any], positions: int, head_dim: int) -> Rope:
        given = config.get("rope_scaling") or config.get("rope_parameters")
        return super().rope(config if given else {**config, "rope_parameters": _YARN}, positions, head_dim)

    def extra_options(self, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        method = (config.get(_QUANTIZATION) or {}).get("quant_method")
        return {
            **super().extra_options(config, layers),
            **window_options(config, layers, window_of(config, 128), list(range(1, layers, 2))),
            "gate_limit": float(config_number(config, _LIMIT, 7.0)),
            "gate_alpha": float(config_number(config, _ALPHA, 1.702)),
            "packing": str(MXFP4) if method == str(MXFP4) else None,
        }

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        options = shape.options
        packing = options.get("packing")
        return {
            **super().config_from_shape(shape),
            **window_config(shape),
            _LIMIT: options.get("gate_limit", 7.0),
            _ALPHA: options.get("gate_alpha", 1.702),
            **({_QUANTIZATION: {"quant_method": packing}} if packing else {}),
        }

    def layer(self, shape: ModelShape, has_window: bool) -> Layer:
        layer = super().layer(shape, has_window)
        return replace(layer, attention=replace(layer.attention, sinks=True))

    def dense_mlp(self, shape: ModelShape, width: int) -> MLP:
        options = shape.options
        clamp = Clamp(float(options.get("gate_limit", 7.0)), float(options.get("gate_alpha", 1.702)))
        return replace(super().dense_mlp(shape, width), bias=True, clamp=clamp)

    def router(self, shape: ModelShape) -> Router:
        return replace(super().router(shape), bias=True)

    def mlp(self, shape: ModelShape, number: int) -> Experts:
        packing = shape.options.get("packing")
        if packing not in (None, str(MXFP4)):
            raise UserError("model.options.packing", packing, f"{MXFP4}, or null")
        experts = super().mlp(shape, number)
        assert isinstance(experts, Experts), "no layer is dense"
        return replace(experts, packing=MXFP4 if packing else None)


FAMILIES = (GptOss(),)
