"""OPT (Zhang et al. 2022): learned positions, ReLU MLP, multi-head attention; all sizes, 125m to 175b.

Options of ``ModelShape``: norm_before (False only for 350m: layer norms after the residual additions),
embed_dim (350m: tokens live in 512 dimensions and are projected), activation, bias, norm_affine, final_norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.activations import activation_of
from flexgen_bench.models.family import ModelFamily, config_flag, config_value
from flexgen_bench.models.inventory import Names
from flexgen_bench.models.parts import MLP, Attention, Decoder, Embedding, Head, Layer, Norm, NormKind, NormPlace

# Position p uses row p + 2: the published checkpoints inherit fairseq's padding offset.
POSITION_OFFSET = 2
NORM_EPS = 1e-5  # torch's default, which the published models were trained with


class OPT(ModelFamily):
    name = "opt"
    architecture = "OPTForCausalLM"
    model_type = "opt"
    prefixes = ("model.decoder.", "decoder.", "")
    names = Names(
        layer={
            "attention_norm": "self_attn_layer_norm",
            "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "out": "self_attn.out_proj",
            "mlp_norm": "final_layer_norm",
            "up": "fc1",
            "down": "fc2",
        },
        norm="final_layer_norm",
    )

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

    def decoder(self, shape: ModelShape) -> Decoder:
        options = shape.options
        bias, before = bool(options.get("bias", True)), bool(options.get("norm_before", True))
        norm = Norm(NormKind.LAYER, NORM_EPS, affine=bool(options.get("norm_affine", True)))
        layer = Layer(
            hidden=shape.hidden_size,
            attention=Attention(
                heads=shape.num_heads,
                kv_heads=shape.num_heads,
                head_dim=shape.head_dim,
                scale=shape.head_dim**-0.5,
                bias=bias,
                out_bias=bias,
            ),
            mlp=MLP(shape.ffn_size, str(options.get("activation", "relu")), gated=False, bias=bias),
            attention_norm=norm,
            mlp_norm=norm,
            place=NormPlace.BEFORE if before else NormPlace.AFTER,
        )
        return Decoder(
            hidden=shape.hidden_size,
            vocab=shape.vocab_size,
            tied=shape.tied_embeddings,
            embedding=Embedding(_embed_dim(shape), shape.max_positions, POSITION_OFFSET),
            layers=(layer,) * shape.num_layers,
            head=Head(norm if options.get("final_norm", before) else None),
        )


def _embed_dim(shape: ModelShape) -> int:
    return int(shape.options.get("embed_dim") or shape.hidden_size)


FAMILIES = (OPT(),)
