"""Qwen3's mixtures of experts (2025), and Qwen1.5's and Qwen2's (Yang et al. 2024), whose tokens also go through a
shared MLP with a gate. Layers may be dense.

Options of ``ModelShape``: those of ``mixture.py``, attention_bias, window, full_layers; of Qwen2's shared_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.family import config_flag
from flexgen_bench.models.inventory import Names, PartNames
from flexgen_bench.models.llama_like import LAYER_NAMES, window_config, window_of, window_options
from flexgen_bench.models.mixture import EXPERT_NAMES, STACKED_NAMES, MixtureLike, count_of
from flexgen_bench.models.parts import MLP, Layer

_SHARED: PartNames = {
    "shared.gate_up": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "shared.down": "mlp.shared_expert.down_proj",
    "shared_gate": "mlp.shared_expert_gate",
}
_DENSE, _STEP = "mlp_only_layers", "decoder_sparse_step"
_BIAS, _SHARED_SIZE = "qkv_bias", "shared_expert_intermediate_size"


class QwenMoe(MixtureLike):
    """What both have."""

    renormalised = False
    positions = 32768

    def extra_options(self, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        step = count_of({_STEP: 1, **config}, _STEP, 1)
        listed = config.get(_DENSE) or []
        if not isinstance(listed, list) or not all(isinstance(number, int) for number in listed):
            raise UserError(f"config.json: {_DENSE}", listed, "a list of numbers of layers, or null")
        dense = [number for number in range(layers) if number in listed or (number + 1) % step]
        window = window_of(config, 4096) if config_flag(config, "use_sliding_window", False) else None
        windows = self.windows(config, layers, window)
        return super().extra_options(config, layers) | {"dense_layers": dense} | windows

    def windows(self, config: Mapping[str, Any], layers: int, window: int | None) -> dict[str, Any]:
        """Options that say which layers have this window: all of them."""
        return window_options({}, layers, window, [])

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        options = shape.options
        window, dense = options.get("window"), list(options.get("dense_layers") or ())
        own = {"sliding_window": window, "use_sliding_window": window is not None, _DENSE: dense, _STEP: 1}
        return super().config_from_shape(shape) | own


class Qwen3Moe(QwenMoe):
    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    model_type = "qwen3_moe"
    reads = ("sliding_window", *QwenMoe.count_keys)
    experts, per_token, expert_size = 128, 8, 768
    kv_heads = 4
    bias_keys = ("attention_bias",)

    def layer(self, shape: ModelShape, has_window: bool) -> Layer:
        layer = super().layer(shape, has_window)
        return replace(layer, attention=replace(layer.attention, qk_norm=self.norm(shape)))


class Qwen2Moe(QwenMoe):
    name = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    model_type = "qwen2_moe"
    names = Names(LAYER_NAMES | EXPERT_NAMES | _SHARED)
    other_names: ClassVar[tuple[Names, ...]] = (Names(LAYER_NAMES | STACKED_NAMES | _SHARED),)
    count_keys = ("num_experts",)
    reads = ("sliding_window", "layer_types", *count_keys)
    experts, per_token, expert_size = 60, 4, 1408
    kv_heads = 16
    qkv_bias, out_bias = True, False
    shared_gate = True

    def extra_options(self, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        return super().extra_options(config, layers) | {
            "attention_bias": config_flag(config, _BIAS, True),
            "shared_size": count_of({_SHARED_SIZE: 5632, **config}, _SHARED_SIZE, 1),
        }

    def windows(self, config: Mapping[str, Any], layers: int, window: int | None) -> dict[str, Any]:
        """Where a config lists no kinds, every other one of the first."""
        first = int(config.get("max_window_layers", 28))
        full = [number for number in range(layers) if number % 2 or number >= first]
        return window_options(config, layers, window, full)

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        options = shape.options
        own = {_BIAS: options.get("attention_bias", True), _SHARED_SIZE: options["shared_size"]}
        return super().config_from_shape(shape) | window_config(shape) | own

    def shared(self, shape: ModelShape) -> MLP:
        return self.dense_mlp(shape, int(shape.options["shared_size"]))


FAMILIES = (Qwen3Moe(), Qwen2Moe())
