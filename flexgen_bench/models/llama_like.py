"""Families of Llama's form: RMSNorm, rotary positions, a gated MLP, grouped-query attention, and configs with Llama's
words.

Common options of ``ModelShape``: rope_theta, rope_scaling (None or a mapping, ``models/rope.py``), norm_eps,
activation; attention_bias and mlp_bias where a family's configs have them; of families with windows, window (None, or
tokens) and full_layers (the numbers of the layers without it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.score_mod import ScoreMod
from flexgen_bench.models.activations import activation_of
from flexgen_bench.models.family import ModelFamily, config_flag, config_number, config_value
from flexgen_bench.models.inventory import Names, PartNames
from flexgen_bench.models.parts import MLP, Attention, Decoder, Embedding, Experts, Head, Layer, Norm, NormKind, Rotary
from flexgen_bench.models.rope import DEFAULT_THETA, Rope, positions_of, rope_of, rotated

_POSITIONS = "max_position_embeddings"
LAYER_NAMES: PartNames = {
    "attention_norm": "input_layernorm",
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": "mlp.down_proj",
}


class LlamaLike(ModelFamily):
    """What differs is said by class attributes, or by ``layer`` and ``extra_options``."""

    prefixes = ("model.", "")
    names = Names(layer=LAYER_NAMES)
    norm_kind: ClassVar[NormKind] = NormKind.RMS
    # Entries of a config that turn biases on, by the option they become; those that always or never are there, with the
    # option.
    bias_keys: ClassVar[tuple[str, ...]] = ()
    qkv_bias: ClassVar[bool] = False
    out_bias: ClassVar[bool | None] = None  # None: as of the projection
    # transformers' defaults where a config says nothing
    positions: ClassVar[int] = 2048
    theta: ClassVar[float] = DEFAULT_THETA
    eps: ClassVar[float] = 1e-6
    head_dim: ClassVar[int | None] = None  # None: hidden_size / heads
    kv_heads: ClassVar[int | None] = None  # None: as many as heads
    tied: ClassVar[bool] = False
    activation: ClassVar[str] = "silu"
    activation_key: ClassVar[str] = "hidden_act"
    interleaved: ClassVar[bool] = False
    # Of a head that is rotated; None: all, and no config may say otherwise.
    share: ClassVar[float | None] = None

    def shape_from_config(self, config: Mapping[str, Any], name: str) -> ModelShape:
        hidden = config_value(config, "hidden_size", int)
        heads = config_value(config, "num_attention_heads", int)
        head_dim = int(config.get("head_dim") or self.head_dim or hidden // heads)
        positions = config.get(_POSITIONS)
        if positions is None:
            positions = self.positions
        checked = config_value({**config, _POSITIONS: positions}, _POSITIONS, int)
        rope = self.rope(config, checked, head_dim)
        kv_heads = config.get("num_key_value_heads", self.kv_heads)
        layers = config_value(config, "num_hidden_layers", int)
        options = {
            "rope_theta": rope.theta,
            "rope_scaling": rope.scaling,
            "norm_eps": float(config.get("rms_norm_eps", self.eps)),
            **{key: config_flag(config, key, self.qkv_bias) for key in self.bias_keys},
            "activation": activation_of(
                f"config.json: {self.activation_key}", config.get(self.activation_key, self.activation)
            ),
        }
        if self.share is not None:
            options["rope_share"] = rope.share
        return ModelShape(
            name=name,
            family=self.name,
            num_layers=layers,
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=int(kv_heads or heads),
            head_dim=head_dim,
            ffn_size=config_value(config, "intermediate_size", int),
            vocab_size=config_value(config, "vocab_size", int),
            max_positions=rope.reach,
            tied_embeddings=config_flag(config, "tie_word_embeddings", self.tied),
            options=options | self.extra_options(config, layers),
        )

    def rope(self, config: Mapping[str, Any], positions: int, head_dim: int) -> Rope:
        """The rotary positions of a config."""
        return rope_of(config, positions, head_dim, self.share, self.theta)

    def extra_options(self, config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        """Options that only this family has."""
        return {}

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        options = shape.options
        scaling = options.get("rope_scaling")
        rope = dict(scaling or {"rope_type": "default"}) | {"rope_theta": self.theta_of(shape)}
        if self.share is not None:
            rope["partial_rotary_factor"] = self.share_of(shape)
        return {
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "num_key_value_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "intermediate_size": shape.ffn_size,
            _POSITIONS: positions_of(scaling, shape.max_positions),
            "rms_norm_eps": self.eps_of(shape),
            self.activation_key: options.get("activation", self.activation),
            **{key: options.get(key, self.qkv_bias) for key in self.bias_keys},
            "rope_parameters": rope,
            "tie_word_embeddings": shape.tied_embeddings,
        }

    def decoder(self, shape: ModelShape) -> Decoder:
        full = set(shape.options.get("full_layers") or ())
        kinds: dict[tuple[bool, MLP | Experts], Layer] = {}  # layers of the same parts are one object
        layers = []
        for number in range(shape.num_layers):
            kind = (number not in full, self.mlp(shape, number))
            if kind not in kinds:
                kinds[kind] = replace(self.layer(shape, kind[0]), mlp=kind[1])
            layers.append(kinds[kind])
        return Decoder(
            hidden=shape.hidden_size,
            vocab=shape.vocab_size,
            tied=shape.tied_embeddings,
            embedding=self.embedding(shape),
            layers=tuple(layers),
            head=self.head(shape),
            rotaries=self.rotaries(shape),
        )

    def mlp(self, shape: ModelShape, number: int) -> MLP | Experts:
        """What the ``number``-th layer has for an MLP."""
        return self.dense_mlp(shape, shape.ffn_size)

    def dense_mlp(self, shape: ModelShape, width: int) -> MLP:
        options = shape.options
        activation = str(options.get("activation", self.activation))
        return MLP(width, activation, gated=True, bias=bool(options.get("mlp_bias", False)))

    def embedding(self, shape: ModelShape) -> Embedding:
        return Embedding(shape.hidden_size)

    def head(self, shape: ModelShape) -> Head:
        return Head(self.norm(shape))

    def rotaries(self, shape: ModelShape) -> tuple[Rotary, ...]:
        dim = rotated(shape.head_dim, self.share_of(shape))
        scaling = shape.options.get("rope_scaling")
        return (Rotary(dim, self.theta_of(shape), scaling, self.interleaved),)

    def layer(self, shape: ModelShape, has_window: bool) -> Layer:
        """A layer with the model's window, if it has one, or without."""
        options = shape.options
        bias = bool(options.get("attention_bias", self.qkv_bias))
        norm = self.norm(shape)
        return Layer(
            hidden=shape.hidden_size,
            attention=Attention(
                heads=shape.num_heads,
                kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                scale=shape.head_dim**-0.5,
                bias=bias,
                out_bias=bias if self.out_bias is None else self.out_bias,
                rotary=0,
                mod=ScoreMod(window=options.get("window") if has_window else None),
            ),
            mlp=self.dense_mlp(shape, shape.ffn_size),
            attention_norm=norm,
            mlp_norm=norm,
        )

    def norm(self, shape: ModelShape) -> Norm:
        return Norm(self.norm_kind, self.eps_of(shape))

    def eps_of(self, shape: ModelShape) -> float:
        return float(shape.options.get("norm_eps", self.eps))

    def theta_of(self, shape: ModelShape) -> float:
        return float(shape.options.get("rope_theta", self.theta))

    def share_of(self, shape: ModelShape) -> float:
        return float(shape.options.get("rope_share") or self.share or 1.0)


def window_options(config: Mapping[str, Any], layers: int, window: int | None, full: list[int]) -> dict[str, Any]:
    """Options of a model with this window on all layers but those in ``full``, unless its config lists
    ``layer_types``."""
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise UserError("config.json: layer_types", kinds, f"a list of {layers} kinds, or left out")
        other = [k for k in kinds if k not in ("full_attention", "sliding_attention")]
        if other:
            raise UserError("config.json: layer_types", other[0], "full_attention or sliding_attention")
        full = [number for number, kind in enumerate(kinds) if kind == "full_attention"]
        if window is None and len(full) < layers:
            raise UserError(
                "config.json: layer_types",
                "sliding_attention",
                "full_attention for every layer of a model without sliding_window",
            )
    if window is None or len(full) == layers:
        return {"window": None, "full_layers": []}
    return {"window": window, "full_layers": full}


def window_config(shape: ModelShape) -> dict[str, Any]:
    """The inverse of ``window_options``."""
    window, full = shape.options.get("window"), set(shape.options.get("full_layers") or ())
    kinds = [
        "full_attention" if window is None or number in full else "sliding_attention"
        for number in range(shape.num_layers)
    ]
    return {"sliding_window": window, "layer_types": kinds}


def window_of(config: Mapping[str, Any], default: int | None) -> int | None:
    """``sliding_window``: tokens, null for none, ``default`` where it is missing."""
    if "sliding_window" not in config:
        return default
    window = config_number(config, "sliding_window", None)
    if window is not None and not isinstance(window, int):
        raise UserError("config.json: sliding_window", window, "a number of tokens, or null")
    return None if window is None else int(window)
