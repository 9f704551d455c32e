"""OPT (Zhang et al. 2022): learned positions, ReLU MLP, multi-head attention; all sizes, 125m to 175b.

Options of ``ModelShape``: norm_before (False only for 350m: layer norms after the residual additions),
embed_dim (350m: tokens live in 512 dimensions and are projected), activation, bias, norm_affine, final_norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape, TensorSpec
from flexgen_bench.models.activations import activation_of
from flexgen_bench.models.family import Inventory, ModelFamily, PackedTensor, Weights, config_flag, config_value

if TYPE_CHECKING:
    from torch import Tensor

# Position p uses row p + 2: the published checkpoints inherit fairseq's padding offset.
POSITION_OFFSET = 2
NORM_EPS = 1e-5  # torch's default, which the published models were trained with


class OPT(ModelFamily):
    name = "opt"
    architecture = "OPTForCausalLM"
    model_type = "opt"
    prefixes = ("model.decoder.", "decoder.", "")

    def shape_from_config(self, config: Mapping[str, Any], name: str) -> ModelShape:
        hidden = config_value(config, "hidden_size", int)
        heads = config_value(config, "num_attention_heads", int)
        norm_before = config_flag(config, "do_layer_norm_before", True)
        tied = config_flag(config, "tie_word_embeddings", True)
        if hidden % heads:
            raise UserError("config.json: num_attention_heads", heads, f"a divisor of {hidden}")
        return ModelShape(
            name=name,
            family=self.name,
            num_layers=config_value(config, "num_hidden_layers", int),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hidden // heads,
            ffn_size=config_value(config, "ffn_dim", int),
            vocab_size=config_value(config, "vocab_size", int),
            max_positions=config_value(config, "max_position_embeddings", int),
            tied_embeddings=tied,
            options={
                "norm_before": norm_before,
                "embed_dim": int(config.get("word_embed_proj_dim") or hidden),
                "activation": activation_of(
                    "config.json: activation_function", config.get("activation_function", "relu")
                ),
                "bias": config_flag(config, "enable_bias", True),
                "norm_affine": config_flag(config, "layer_norm_elementwise_affine", True),
                "final_norm": norm_before and not config_flag(config, "_remove_final_layer_norm", False),
            },
        )

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        if shape.head_dim * shape.num_heads != shape.hidden_size:
            raise UserError("model.head_dim", shape.head_dim, "hidden_size / num_heads for an OPT model")
        return {
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "ffn_dim": shape.ffn_size,
            "max_position_embeddings": shape.max_positions,
            "do_layer_norm_before": shape.options.get("norm_before", True),
            "word_embed_proj_dim": _embed_dim(shape),
            "activation_function": shape.options.get("activation", "relu"),
            "enable_bias": shape.options.get("bias", True),
            "layer_norm_elementwise_affine": shape.options.get("norm_affine", True),
            "tie_word_embeddings": shape.tied_embeddings,
            "_remove_final_layer_norm": not shape.options.get("final_norm", True),
        }

    def inventory(self, shape: ModelShape) -> Inventory:
        h, f, e = shape.hidden_size, shape.ffn_size, _embed_dim(shape)
        has_bias = bool(shape.options.get("bias", True))

        def linear(packed: str, out: int, inp: int, *sources: str) -> list[PackedTensor]:
            weight = PackedTensor(TensorSpec(f"{packed}.weight", (out, inp)), tuple(f"{s}.weight" for s in sources))
            bias = PackedTensor(TensorSpec(f"{packed}.bias", (out,)), tuple(f"{s}.bias" for s in sources))
            return [weight, bias] if has_bias else [weight]

        def norm(packed: str, source: str) -> list[PackedTensor]:
            if not shape.options.get("norm_affine", True):
                return []
            return [
                PackedTensor(TensorSpec(f"{packed}.{part}", (h,)), (f"{source}.{part}",)) for part in ("weight", "bias")
            ]

        def layer(i: int) -> tuple[PackedTensor, ...]:
            p = f"layers.{i}"
            qkv = [f"{p}.self_attn.{x}_proj" for x in "qkv"]
            return (
                *norm("attention_norm", f"{p}.self_attn_layer_norm"),
                *linear("qkv", 3 * h, h, *qkv),
                *linear("out", h, h, f"{p}.self_attn.out_proj"),
                *norm("mlp_norm", f"{p}.final_layer_norm"),
                *linear("up", f, h, f"{p}.fc1"),
                *linear("down", h, f, f"{p}.fc2"),
            )

        positions = TensorSpec("positions", (shape.max_positions + POSITION_OFFSET, h))
        tables = (
            PackedTensor(positions, ("embed_positions.weight",)),
            PackedTensor(TensorSpec("tokens", (shape.vocab_size, e)), ("embed_tokens.weight",)),
        )
        embed: list[PackedTensor] = []
        head: list[PackedTensor] = norm("norm", "final_layer_norm") if _final_norm(shape) else []
        if e != h:
            embed += [PackedTensor(TensorSpec("project_in", (h, e)), ("project_in.weight",))]
            head += [PackedTensor(TensorSpec("project_out", (e, h)), ("project_out.weight",))]
        if not shape.tied_embeddings:
            head += [PackedTensor(TensorSpec("unembed", (shape.vocab_size, e)), ("lm_head.weight",))]
        return Inventory(
            tables=tables,
            embed=tuple(embed),
            layers=tuple(layer(i) for i in range(shape.num_layers)),
            head=tuple(head),
            tied=shape.tied_embeddings,
        )

    def rows(self, shape: ModelShape, token_ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
        return {"positions": positions + POSITION_OFFSET, "tokens": token_ids}

    def embed(self, ops: Any, shape: ModelShape, w: Weights, rows: Weights) -> Tensor:
        x = rows["tokens"]
        if "project_in" in w:
            x = ops.linear(x, w["project_in"])
        return x + rows["positions"]

    def project(self, ops: Any, shape: ModelShape, w: Weights, x: Tensor, angles: Any) -> tuple[Tensor, Tensor, Tensor]:
        if shape.options.get("norm_before", True):
            x = ops.layer_norm(x, w.get("attention_norm.weight"), w.get("attention_norm.bias"), NORM_EPS)
        qkv = ops.linear(x, w["qkv.weight"], w.get("qkv.bias"))
        q, k, v = qkv.view(-1, 3, shape.num_heads, shape.head_dim).unbind(1)
        return q, k, v

    def output(self, ops: Any, shape: ModelShape, w: Weights, x: Tensor, attended: Tensor) -> Tensor:
        before = bool(shape.options.get("norm_before", True))
        x = x + ops.linear(attended, w["out.weight"], w.get("out.bias"))
        if not before:
            x = ops.layer_norm(x, w.get("attention_norm.weight"), w.get("attention_norm.bias"), NORM_EPS)
        y = x
        if before:
            y = ops.layer_norm(x, w.get("mlp_norm.weight"), w.get("mlp_norm.bias"), NORM_EPS)
        y = ops.linear(y, w["up.weight"], w.get("up.bias"))
        y = ops.activation(str(shape.options.get("activation", "relu")), y)
        x = x + ops.linear(y, w["down.weight"], w.get("down.bias"))
        if not before:
            x = ops.layer_norm(x, w.get("mlp_norm.weight"), w.get("mlp_norm.bias"), NORM_EPS)
        return x

    def head(self, ops: Any, shape: ModelShape, w: Weights, x: Tensor) -> Tensor:
        if _final_norm(shape):
            x = ops.layer_norm(x, w.get("norm.weight"), w.get("norm.bias"), NORM_EPS)
        if "project_out" in w:
            x = ops.linear(x, w["project_out"])
        return ops.linear(x, w["tokens"] if shape.tied_embeddings else w["unembed"])


def _embed_dim(shape: ModelShape) -> int:
    return int(shape.options.get("embed_dim") or shape.hidden_size)


def _final_norm(shape: ModelShape) -> bool:
    return bool(shape.options.get("final_norm", shape.options.get("norm_before", True)))


FAMILY = OPT()
