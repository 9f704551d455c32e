"""Gemma 3 (Gemma Team 2025), text models: Gemma 2 with a norm over each head's queries and keys instead of the caps,
and another rotary base in the five layers of six that have a window.

Options of ``ModelShape``: those of ``gemma2.py`` without attention_soft_cap, and rope_local_theta.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.family import config_number
from flexgen_bench.models.gemma2 import LOGITS, Gemma2
from flexgen_bench.models.parts import Layer, Rotary
from flexgen_bench.models.rope import Rope, rope_of

_LOCAL_THETA = 10_000.0


class Gemma3(Gemma2):
    name = "gemma3"
    architecture = "Gemma3ForCausalLM"
    model_type = "gemma3_text"
    reads = ("sliding_window", "layer_types", LOGITS)
    positions, theta = 131_072, 1_000_000.0
    logit_cap = score_cap = None
    pattern = 6

    def pattern_of(self, config: Mapping[str, Any]) -> int:
        return int(config_number(config, "sliding_window_pattern", self.pattern))

    def rope(self, config: Mapping[str, Any], positions: int, head_dim: int) -> Rope:
        given = self._ropes(config)["full_attention"]
        return rope_of({"rope_parameters": given}, positions, head_dim, None, self.theta)

    def _ropes(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Of both kinds of layers. Old configs have one base for each, and a scaling for layers without a window
        alone."""
        nested = config.get("rope_parameters") or {}
        flat = [key for key, value in nested.items() if not isinstance(value, Mapping)]
        if flat:
            raise UserError("config.json: rope_parameters", flat[0], "a mapping for each kind of layer")
        full, local = (dict(nested.get(f"{kind}_attention") or {}) for kind in ("full", "sliding"))
        full |= config.get("rope_scaling") or {}
        full.setdefault("rope_theta", config.get("rope_theta") or self.theta)
        local.setdefault("rope_theta", config.get("rope_local_base_freq") or _LOCAL_THETA)
        return {"full_attention": full, "sliding_attention": local}

    def extra_options(self, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        local = rope_of({"rope_parameters": self._ropes(config)["sliding_attention"]}, 1, 2)
        if local.scaling is not None:
            kind = local.scaling["rope_type"]
            raise UserError("config.json: rope_type of sliding_attention", kind, "default")
        return super().extra_options(config, layers) | {"rope_local_theta": local.theta}

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        config = super().config_from_shape(shape)
        local = {"rope_type": "default", "rope_theta": self._local_theta(shape)}
        ropes = {"full_attention": config["rope_parameters"], "sliding_attention": local}
        return config | {"rope_parameters": ropes}

    def rotaries(self, shape: ModelShape) -> tuple[Rotary, ...]:
        return *super().rotaries(shape), Rotary(shape.head_dim, self._local_theta(shape))

    def layer(self, shape: ModelShape, has_window: bool) -> Layer:
        layer = super().layer(shape, has_window)
        is_local = has_window and shape.options.get("window") is not None
        attention = replace(layer.attention, qk_norm=self.norm(shape), rotary=int(is_local))
        return replace(layer, attention=attention)

    def _local_theta(self, shape: ModelShape) -> float:
        return float(shape.options.get("rope_local_theta", _LOCAL_THETA))


FAMILIES = (Gemma3(),)
