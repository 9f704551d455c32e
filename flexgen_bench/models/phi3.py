"""Phi-3 and Phi-4 (Abdin et al. 2024): Llama's form with fused projections, LongRoPE, and in Phi-4-mini three quarters
of a head rotated.

Options of ``ModelShape``: those of ``llama_like.py``, and rope_share; no biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.inventory import Names
from flexgen_bench.models.llama_like import LAYER_NAMES, LlamaLike, window_of, window_options
from flexgen_bench.models.rope import Rope, rope_of, steady_positions

_ORIGINAL = "original_max_position_embeddings"


class Phi3(LlamaLike):
    name = "phi3"
    architecture = "Phi3ForCausalLM"
    model_type = "phi3"
    reads = ("sliding_window",)
    names = Names(LAYER_NAMES | {"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"})
    positions = 4096
    eps = 1e-5
    share = 1.0

    def rope(self, config: Mapping[str, Any], positions: int, head_dim: int) -> Rope:
        given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        kind = given.get("rope_type") or given.get("type") or "default"
        if kind in ("su", "yarn"):  # LongRoPE by the names it had in early configs
            kind = "longrope"
        if kind not in ("default", "longrope"):
            raise UserError("config.json: rope_type", kind, "default or longrope for a phi3 model")
        given["rope_type"] = kind
        words = {**config, "rope_scaling": given, _ORIGINAL: config.get(_ORIGINAL) or 4096}
        return rope_of(words, positions, head_dim, self.share, self.theta)

    def extra_options(self, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        return window_options({}, layers, window_of(config, None), [])

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        scaling = shape.options.get("rope_scaling") or {}
        original = scaling.get(_ORIGINAL, shape.max_positions)
        own = {"sliding_window": shape.options.get("window"), _ORIGINAL: original}
        return super().config_from_shape(shape) | own

    def rotated_anew_beyond(self, shape: ModelShape) -> int | None:
        return steady_positions(shape.options.get("rope_scaling"))


FAMILIES = (Phi3(),)
