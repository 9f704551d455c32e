"""GPT-NeoX and Pythia (Black et al. 2022, Biderman et al. 2023): attention and MLP side by side, each behind its norm,
a quarter of a head rotated.

Options of ``ModelShape``: norm_eps, activation, parallel, attention_bias, rope_theta, rope_scaling, rope_share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.activations import activation_of
from flexgen_bench.models.family import ModelFamily, config_flag, config_number, must_be
from flexgen_bench.models.gpt_like import EPS, decoder_of, head_dim_of, layer_of, named
from flexgen_bench.models.inventory import Names, PartNames
from flexgen_bench.models.parts import Decoder, Rotary
from flexgen_bench.models.rope import DEFAULT_THETA, positions_of, rope_of, rotated

_LAYER: PartNames = {
    "attention_norm": "input_layernorm",
    "qkv": "attention.query_key_value",
    "out": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
_NAMES = {"tokens": "embed_in", "norm": "final_layer_norm"}
_POSITIONS, _SHARE = "max_position_embeddings", 0.25


class GPTNeoX(ModelFamily):
    name = "gpt_neox"
    architecture = "GPTNeoXForCausalLM"
    model_type = "gpt_neox"
    prefixes = ("gpt_neox.", "")
    names = Names(_LAYER, **_NAMES)
    other_names = (Names(_LAYER, **_NAMES, unembed="embed_out"),)  # before transformers 5

    def shape_from_config(self, config: Mapping[str, Any], name: str) -> ModelShape:
        hidden, heads = named(config, "hidden_size"), named(config, "num_attention_heads")
        head_dim, flags = head_dim_of(hidden, heads), ("use_parallel_residual", "attention_bias")
        must_be(config, self.name, head_dim=(None, head_dim))  # transformers would rotate by it, and not use it else
        words = dict(config) | {
            "rope_theta": config.get("rotary_emb_base"),
            "partial_rotary_factor": config.get("rotary_pct"),
        }
        positions = int(config_number(config, _POSITIONS, 2048))
        rope = rope_of(words, positions, head_dim, _SHARE)
        parallel, bias = (config_flag(config, key, True) for key in flags)
        return ModelShape(
            name=name,
            family=self.name,
            num_layers=named(config, "num_hidden_layers"),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            ffn_size=named(config, "intermediate_size"),
            vocab_size=named(config, "vocab_size"),
            max_positions=rope.reach,
            tied_embeddings=config_flag(config, "tie_word_embeddings", False),
            options={
                "norm_eps": float(config_number(config, "layer_norm_eps", EPS)),
                "activation": activation_of("config.json: hidden_act", config.get("hidden_act", "gelu")),
                "parallel": parallel,
                "attention_bias": bias,
                "rope_theta": rope.theta,
                "rope_scaling": rope.scaling,
                "rope_share": rope.share,
            },
        )

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        options, scaling = shape.options, shape.options.get("rope_scaling")
        rope = dict(scaling or {"rope_type": "default"}) | {
            "rope_theta": options.get("rope_theta", DEFAULT_THETA),
            "partial_rotary_factor": options.get("rope_share", _SHARE),
        }
        return {
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "intermediate_size": shape.ffn_size,
            _POSITIONS: positions_of(scaling, shape.max_positions),
            "layer_norm_eps": options.get("norm_eps", EPS),
            "hidden_act": options.get("activation", "gelu"),
            "use_parallel_residual": options.get("parallel", True),
            "attention_bias": options.get("attention_bias", True),
            "rope_parameters": rope,
            "tie_word_embeddings": shape.tied_embeddings,
        }

    def decoder(self, shape: ModelShape) -> Decoder:
        options = shape.options
        bias, parallel = (bool(options.get(key, True)) for key in ("attention_bias", "parallel"))
        dim = rotated(shape.head_dim, float(options.get("rope_share", _SHARE)))
        theta = float(options.get("rope_theta", DEFAULT_THETA))
        layer = layer_of(shape, "gelu", bias=bias, parallel=parallel, blocks=shape.num_heads, rotary=0)
        return decoder_of(shape, layer, rotaries=(Rotary(dim, theta, options.get("rope_scaling")),))


FAMILIES = (GPTNeoX(),)
