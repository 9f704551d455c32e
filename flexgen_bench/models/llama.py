"""Llama (Touvron et al. 2023) and its relatives of the same form: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Options of ``ModelShape``: rope_theta, rope_scaling (None or the checkpoint's own mapping), norm_eps,
attention_bias, mlp_bias, activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape, TensorSpec
from flexgen_bench.models.family import (
    Inventory,
    ModelFamily,
    PackedTensor,
    Weights,
    config_value,
)

if TYPE_CHECKING:
    from torch import Tensor

# Ways of scaling rotary frequencies, and the numbers each needs.
_ROPE_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class Llama(ModelFamily):
    name = "llama"
    architecture = "LlamaForCausalLM"
    model_type = "llama"
    prefixes = ("model.", "")

    def shape_from_config(self, config: Mapping[str, Any], name: str) -> ModelShape:
        hidden = config_value(config, "hidden_size", int)
        heads = config_value(config, "num_attention_heads", int)
        # Newer checkpoints keep base and scaling together in rope_parameters; older ones have two entries.
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = float(rope.pop("rope_theta", config.get("rope_theta", 10000.0)))
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        if kind not in _ROPE_NUMBERS:
            raise UserError("config.json: rope_type", kind, f"one of {', '.join(_ROPE_NUMBERS)}")
        needed = _ROPE_NUMBERS[kind]
        bad = [
            key for key in needed if not isinstance(rope.get(key), int | float) or rope[key] <= 0
        ]
        if bad:
            raise UserError(
                f"config.json: {bad[0]} of rope_type {kind}", rope.get(bad[0]), "a number above 0"
            )
        if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
            raise UserError(
                "config.json: partial_rotary_factor", rope["partial_rotary_factor"], "1"
            )
        return ModelShape(
            name=name,
            family=self.name,
            num_layers=config_value(config, "num_hidden_layers", int),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            ffn_size=config_value(config, "intermediate_size", int),
            vocab_size=config_value(config, "vocab_size", int),
            max_positions=config_value(config, "max_position_embeddings", int),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            options={
                "rope_theta": theta,
                "rope_scaling": None if kind == "default" else {**rope, "rope_type": kind},
                "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
                "attention_bias": bool(config.get("attention_bias", False)),
                "mlp_bias": bool(config.get("mlp_bias", False)),
                "activation": str(config.get("hidden_act", "silu")),
            },
        )

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        rope = dict(shape.options.get("rope_scaling") or {"rope_type": "default"})
        return {
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.ffn_size,
            "max_position_embeddings": shape.max_positions,
            "rms_norm_eps": _norm_eps(shape),
            "hidden_act": shape.options.get("activation", "silu"),
            "attention_bias": shape.options.get("attention_bias", False),
            "mlp_bias": shape.options.get("mlp_bias", False),
            "rope_parameters": rope | {"rope_theta": _rope_theta(shape)},
            "tie_word_embeddings": shape.tied_embeddings,
        }

    def inventory(self, shape: ModelShape) -> Inventory:
        h, f, d = shape.hidden_size, shape.ffn_size, shape.head_dim
        queries, keys = shape.num_heads * d, shape.num_kv_heads * d

        def linear(
            packed: str, rows: tuple[int, ...], inp: int, bias: str, *sources: str
        ) -> list[PackedTensor]:
            shapes: dict[str, tuple[int, ...]] = {"weight": (sum(rows), inp)}
            if shape.options.get(bias):
                shapes["bias"] = (sum(rows),)
            return [
                PackedTensor(
                    TensorSpec(f"{packed}.{part}", dims),
                    tuple(f"{s}.{part}" for s in sources),
                    rows,
                )
                for part, dims in shapes.items()
            ]

        def layer(i: int) -> tuple[PackedTensor, ...]:
            p, attn, mlp = f"layers.{i}", f"layers.{i}.self_attn", f"layers.{i}.mlp"
            qkv = [f"{attn}.{x}_proj" for x in "qkv"]
            return (
                PackedTensor(TensorSpec("attention_norm", (h,)), (f"{p}.input_layernorm.weight",)),
                *linear("qkv", (queries, keys, keys), h, "attention_bias", *qkv),
                *linear("out", (h,), queries, "attention_bias", f"{attn}.o_proj"),
                PackedTensor(
                    TensorSpec("mlp_norm", (h,)), (f"{p}.post_attention_layernorm.weight",)
                ),
                *linear("gate_up", (f, f), h, "mlp_bias", f"{mlp}.gate_proj", f"{mlp}.up_proj"),
                *linear("down", (h,), f, "mlp_bias", f"{mlp}.down_proj"),
            )

        head = [PackedTensor(TensorSpec("norm", (h,)), ("norm.weight",))]
        if not shape.tied_embeddings:
            head.append(
                PackedTensor(TensorSpec("unembed", (shape.vocab_size, h)), ("lm_head.weight",))
            )
        return Inventory(
            tables=(
                PackedTensor(TensorSpec("tokens", (shape.vocab_size, h)), ("embed_tokens.weight",)),
            ),
            embed=(),
            layers=tuple(layer(i) for i in range(shape.num_layers)),
            head=tuple(head),
            tied=shape.tied_embeddings,
        )

    def rows(self, shape: ModelShape, token_ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
        return {"tokens": token_ids}

    def embed(self, ops: Any, shape: ModelShape, w: Weights, rows: Weights) -> Tensor:
        return rows["tokens"]

    def angles(self, ops: Any, shape: ModelShape, positions: Tensor, like: Tensor) -> Any:
        scaling = shape.options.get("rope_scaling")
        return ops.rotary_table(positions, shape.head_dim, _rope_theta(shape), scaling, like.dtype)

    def project(
        self, ops: Any, shape: ModelShape, w: Weights, x: Tensor, angles: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = ops.rms_norm(x, w["attention_norm"], _norm_eps(shape))
        qkv = ops.linear(x, w["qkv.weight"], w.get("qkv.bias"))
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        q, k, v = qkv.view(-1, sum(heads), shape.head_dim).split(heads, dim=1)
        cos, sin = angles
        return ops.rotate(q, cos, sin), ops.rotate(k, cos, sin), v

    def output(
        self, ops: Any, shape: ModelShape, w: Weights, x: Tensor, attended: Tensor
    ) -> Tensor:
        x = x + ops.linear(attended, w["out.weight"], w.get("out.bias"))
        y = ops.rms_norm(x, w["mlp_norm"], _norm_eps(shape))
        gate, up = ops.linear(y, w["gate_up.weight"], w.get("gate_up.bias")).chunk(2, dim=-1)
        y = ops.activation(str(shape.options.get("activation", "silu")), gate) * up
        return x + ops.linear(y, w["down.weight"], w.get("down.bias"))

    def head(self, ops: Any, shape: ModelShape, w: Weights, x: Tensor) -> Tensor:
        x = ops.rms_norm(x, w["norm"], _norm_eps(shape))
        return ops.linear(x, w["tokens"] if shape.tied_embeddings else w["unembed"])


def _norm_eps(shape: ModelShape) -> float:
    return float(shape.options.get("norm_eps", 1e-5))


def _rope_theta(shape: ModelShape) -> float:
    return float(shape.options.get("rope_theta", 10000.0))


FAMILY = Llama()
