"""GLM-4.5 to 4.7 (GLM-4.5 Team 2025): mixtures of experts behind some dense layers, chosen by sigmoids and a
correction, and an MLP that all tokens go through, too. Halves of half of each head are rotated.

Options of ``ModelShape``: those of ``mixture.py``, attention_bias, qk_norm, rope_share; shared_size, expert_groups,
top_groups, share_scale (``parts.Router``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.family import config_flag, config_number
from flexgen_bench.models.inventory import Names, PartNames
from flexgen_bench.models.llama_like import LAYER_NAMES
from flexgen_bench.models.mixture import EXPERT_NAMES, STACKED_NAMES, MixtureLike, count_of
from flexgen_bench.models.parts import MLP, Layer, Router, Scoring

_MORE: PartNames = {
    "router.correction": "mlp.gate.e_score_correction_bias",
    "shared.gate_up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "shared.down": "mlp.shared_experts.down_proj",
}
_DENSE, _SHARED, _GROUPS, _TOP = "first_k_dense_replace", "n_shared_experts", "n_group", "topk_group"


class Glm4Moe(MixtureLike):
    name = "glm4_moe"
    architecture = "Glm4MoeForCausalLM"
    model_type = "glm4_moe"
    names = Names(LAYER_NAMES | EXPERT_NAMES | _MORE)
    other_names: ClassVar[tuple[Names, ...]] = (Names(LAYER_NAMES | STACKED_NAMES | _MORE),)
    count_keys = ("n_routed_experts", "num_local_experts")
    reads = ("use_qk_norm", *count_keys)
    experts, per_token, expert_size = 128, 8, 1408
    renormalised = True
    positions, kv_heads, eps, share = 131072, 8, 1e-5, 0.5
    bias_keys = ("attention_bias",)
    out_bias = False
    further_layers_key = "num_nextn_predict_layers"

    def extra_options(self, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        options = super().extra_options(config, layers)
        given = {_DENSE: 1, _SHARED: 1, _GROUPS: 1, _TOP: 1, **config}
        groups, top = (count_of(given, key, 1) for key in (_GROUPS, _TOP))
        experts, per_token = options["experts"], options["experts_per_token"]
        if groups > 1 and (experts % groups or experts // groups < 2):
            raise UserError(f"config.json: {_GROUPS}", groups, f"a divisor of {experts} experts, two or more each")
        if top > groups or per_token > top * (experts // groups):
            allowed = f"at most {groups}, and as many as hold {per_token} experts"
            raise UserError(f"config.json: {_TOP}", top, allowed)
        return options | {
            "dense_layers": list(range(min(layers, count_of(given, _DENSE, 0)))),
            "shared_size": options["expert_size"] * count_of(given, _SHARED, 1),
            "expert_groups": groups,
            "top_groups": top,
            "share_scale": float(config_number(config, "routed_scaling_factor", 1.0)),
            "qk_norm": config_flag(config, "use_qk_norm", False),
        }

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        options = shape.options
        return super().config_from_shape(shape) | {
            _DENSE: len(options.get("dense_layers") or ()),
            _SHARED: options["shared_size"] // options["expert_size"],
            _GROUPS: options.get("expert_groups", 1),
            _TOP: options.get("top_groups", 1),
            "routed_scaling_factor": options.get("share_scale", 1.0),
            "use_qk_norm": options.get("qk_norm", False),
        }

    def layer(self, shape: ModelShape, has_window: bool) -> Layer:
        layer = super().layer(shape, has_window)
        qk_norm = self.norm(shape) if shape.options.get("qk_norm") else None
        return replace(layer, attention=replace(layer.attention, qk_norm=qk_norm))

    def shared(self, shape: ModelShape) -> MLP:
        return self.dense_mlp(shape, int(shape.options["shared_size"]))

    def router(self, shape: ModelShape) -> Router:
        options = shape.options
        return replace(
            super().router(shape),
            scoring=Scoring.SIGMOID,
            scale=float(options.get("share_scale", 1.0)),
            correction=True,
            groups=int(options.get("expert_groups", 1)),
            top_groups=int(options.get("top_groups", 1)),
        )


FAMILIES = (Glm4Moe(),)
