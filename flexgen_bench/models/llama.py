"""Llama (Touvron et al. 2023) and its relatives of the same form: RMSNorm, rotary positions, SwiGLU, grouped-query
attention.

Options of ``ModelShape``: rope_theta, rope_scaling (None or a mapping, ``models/rope.py``), norm_eps,
attention_bias, mlp_bias, activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexgen_bench.core.model import ModelShape, TensorSpec
from flexgen_bench.models.activations import activation_of
from flexgen_bench.models.family import Inventory, ModelFamily, PackedTensor, Weights, config_flag, config_value
from flexgen_bench.models.rope import DEFAULT_THETA, positions_of, rope_of, steady_positions

if TYPE_CHECKING:
    from torch import Tensor

_POSITIONS = "max_position_embeddings"
_DEFAULT_POSITIONS = 2048  # of transformers' LlamaConfig


class Llama(ModelFamily):
    name = "llama"
    architecture = "LlamaForCausalLM"
    model_type = "llama"
    prefixes = ("model.", "")

    def shape_from_config(self, config: Mapping[str, Any], name: str) -> ModelShape:
        hidden = config_value(config, "hidden_size", int)
        heads = config_value(config, "num_attention_heads", int)
        head_dim = int(config.get("head_dim") or hidden // heads)
        positions = config.get("max_position_embeddings")
        if positions is None:
            positions = _DEFAULT_POSITIONS
        rope = rope_of(config, config_value({**config, _POSITIONS: positions}, _POSITIONS, int), head_dim)
        return ModelShape(
            name=name,
            family=self.name,
            num_layers=config_value(config, "num_hidden_layers", int),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            ffn_size=config_value(config, "intermediate_size", int),
            vocab_size=config_value(config, "vocab_size", int),
            max_positions=rope.reach,
            tied_embeddings=config_flag(config, "tie_word_embeddings", False),
            options={
                "rope_theta": rope.theta,
                "rope_scaling": rope.scaling,
                "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
                "attention_bias": config_flag(config, "attention_bias", False),
                "mlp_bias": config_flag(config, "mlp_bias", False),
                "activation": activation_of("config.json: hidden_act", config.get("hidden_act", "silu")),
            },
        )

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        scaling = shape.options.get("rope_scaling")
        rope = dict(scaling or {"rope_type": "default"})
        positions = positions_of(scaling, shape.max_positions)
        return {
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.ffn_size,
            "max_position_embeddings": positions,
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

        def linear(packed: str, rows: tuple[int, ...], inp: int, bias: str, *sources: str) -> list[PackedTensor]:
            shapes: dict[str, tuple[int, ...]] = {"weight": (sum(rows), inp)}
            if shape.options.get(bias):
                shapes["bias"] = (sum(rows),)
            return [
                PackedTensor(TensorSpec(f"{packed}.{part}", dims), tuple(f"{s}.{part}" for s in sources), rows)
                for part, dims in shapes.items()
            ]

        def layer(i: int) -> tuple[PackedTensor, ...]:
            p, attn, mlp = f"layers.{i}", f"layers.{i}.self_attn", f"layers.{i}.mlp"
            qkv = [f"{attn}.{x}_proj" for x in "qkv"]
            return (
                PackedTensor(TensorSpec("attention_norm", (h,)), (f"{p}.input_layernorm.weight",)),
                *linear("qkv", (queries, keys, keys), h, "attention_bias", *qkv),
                *linear("out", (h,), queries, "attention_bias", f"{attn}.o_proj"),
                PackedTensor(TensorSpec("mlp_norm", (h,)), (f"{p}.post_attention_layernorm.weight",)),
                *linear("gate_up", (f, f), h, "mlp_bias", f"{mlp}.gate_proj", f"{mlp}.up_proj"),
                *linear("down", (h,), f, "mlp_bias", f"{mlp}.down_proj"),
            )

        head = [PackedTensor(TensorSpec("norm", (h,)), ("norm.weight",))]
        if not shape.tied_embeddings:
            head.append(PackedTensor(TensorSpec("unembed", (shape.vocab_size, h)), ("lm_head.weight",)))
        return Inventory(
            tables=(PackedTensor(TensorSpec("tokens", (shape.vocab_size, h)), ("embed_tokens.weight",)),),
            embed=(),
            layers=tuple(layer(i) for i in range(shape.num_layers)),
            head=tuple(head),
            tied=shape.tied_embeddings,
        )

    def rows(self, shape: ModelShape, token_ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
        return {"tokens": token_ids}

    def embed(self, ops: Any, shape: ModelShape, w: Weights, rows: Weights) -> Tensor:
        return rows["tokens"]

    def steady_positions(self, shape: ModelShape) -> int:
        steady = steady_positions(shape.options.get("rope_scaling"))
        return shape.max_positions if steady is None else steady

    def angles(self, ops: Any, shape: ModelShape, positions: Tensor, lengths: Tensor, like: Tensor) -> Any:
        scaling = shape.options.get("rope_scaling")
        return ops.rotary_table(positions, lengths, shape.head_dim, _rope_theta(shape), scaling, like.dtype)

    def project(self, ops: Any, shape: ModelShape, w: Weights, x: Tensor, angles: Any) -> tuple[Tensor, Tensor, Tensor]:
        x = ops.rms_norm(x, w["attention_norm"], _norm_eps(shape))
        qkv = ops.linear(x, w["qkv.weight"], w.get("qkv.bias"))
        queries, groups = shape.num_heads, shape.num_kv_heads
        rotated, v = qkv.view(-1, queries + 2 * groups, shape.head_dim).split((queries + groups, groups), dim=1)
        cos, sin = angles
        q, k = ops.rotate(rotated, cos, sin).split((queries, groups), dim=1)  # both in one go
        return q, k, v

    def output(self, ops: Any, shape: ModelShape, w: Weights, x: Tensor, attended: Tensor) -> Tensor:
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
    return float(shape.options.get("rope_theta", DEFAULT_THETA))


FAMILY = Llama()
