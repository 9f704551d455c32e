"""What decoders with layer norms, biases and as many KV heads as heads have in common: GPT-J, CodeGen, GPT-NeoX,
BLOOM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.score_mod import NO_MOD, ScoreMod
from flexgen_bench.models.family import config_value
from flexgen_bench.models.parts import MLP, Attention, Decoder, Embedding, Head, Layer, Norm, NormKind, Rotary

EPS = 1e-5


def named(config: Mapping[str, Any], *keys: str) -> Any:
    """An integer entry under the first of its names that the config has."""
    return config_value(config, next((key for key in keys if key in config), keys[0]), int)


def head_dim_of(hidden: int, heads: int, key: str = "num_attention_heads") -> int:
    """Heads are equal parts of the hidden size."""
    if hidden % heads:
        raise UserError(f"config.json: {key}", heads, f"a divisor of {hidden}")
    return hidden // heads


def norm_of(shape: ModelShape) -> Norm:
    return Norm(NormKind.LAYER, float(shape.options.get("norm_eps", EPS)))


def decoder_of(
    shape: ModelShape,
    layer: Layer,
    *,
    embedding_norm: Norm | None = None,
    head_bias: bool = False,
    rotaries: tuple[Rotary, ...] = (),
) -> Decoder:
    """Layers that are all alike, behind a table of tokens and before a head with a norm."""
    return Decoder(
        hidden=shape.hidden_size,
        vocab=shape.vocab_size,
        tied=shape.tied_embeddings,
        embedding=Embedding(shape.hidden_size, norm=embedding_norm),
        layers=(layer,) * shape.num_layers,
        head=Head(norm_of(shape), bias=head_bias),
        rotaries=rotaries,
    )


def layer_of(
    shape: ModelShape,
    activation: str,
    *,
    bias: bool,
    parallel: bool = False,
    own_norm: bool = True,
    blocks: int = 1,
    order: str = "qkv",
    rotary: int | None = None,
    mod: ScoreMod = NO_MOD,
) -> Layer:
    """bias: of the attention's products; the MLP always has them. own_norm: whether the MLP has one."""
    norm = norm_of(shape)
    return Layer(
        hidden=shape.hidden_size,
        attention=Attention(
            heads=shape.num_heads,
            kv_heads=shape.num_heads,
            head_dim=shape.head_dim,
            scale=shape.head_dim**-0.5,
            bias=bias,
            out_bias=bias,
            blocks=blocks,
            order=order,
            rotary=rotary,
            mod=mod,
        ),
        mlp=MLP(shape.ffn_size, str(shape.options.get("activation", activation)), gated=False, bias=True),
        attention_norm=norm,
        mlp_norm=norm if own_norm else None,
        parallel=parallel,
    )
