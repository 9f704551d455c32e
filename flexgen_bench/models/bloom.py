"""BLOOM (Scao et al. 2022): ALiBi instead of positions, a norm after the embedding.

Options of ``ModelShape``: norm_eps. ALiBi has no longest text; max_positions is what a config calls seq_length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.score_mod import ScoreMod, alibi_slopes
from flexgen_bench.models.family import ModelFamily, config_flag, config_number, must_be
from flexgen_bench.models.gpt_like import EPS, decoder_of, head_dim_of, layer_of, named, norm_of
from flexgen_bench.models.inventory import Names
from flexgen_bench.models.parts import Decoder

# transformers' BloomGelu is the tanh form, whatever a config says.
_ACTIVATION = "gelu_new"
_SEQUENCE = 2048  # the length that every published BLOOM was trained with


class Bloom(ModelFamily):
    name = "bloom"
    architecture = "BloomForCausalLM"
    model_type = "bloom"
    prefixes = ("transformer.", "")
    names = Names(
        layer={
            "attention_norm": "input_layernorm",
            "qkv": "self_attention.query_key_value",
            "out": "self_attention.dense",
            "mlp_norm": "post_attention_layernorm",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        },
        layers="h",
        tokens="word_embeddings",
        embedding_norm="word_embeddings_layernorm",
        norm="ln_f",
    )

    def shape_from_config(self, config: Mapping[str, Any], name: str) -> ModelShape:
        must_be(config, self.name, apply_residual_connection_post_layernorm=(False, None))
        hidden = named(config, "n_embed", "hidden_size")
        heads = named(config, "n_head", "num_attention_heads")
        return ModelShape(
            name=name,
            family=self.name,
            num_layers=named(config, "n_layer", "num_hidden_layers"),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim_of(hidden, heads, "n_head"),
            ffn_size=4 * hidden,
            vocab_size=named(config, "vocab_size"),
            max_positions=int(config_number(config, "seq_length", _SEQUENCE)),
            tied_embeddings=config_flag(config, "tie_word_embeddings", True),
            options={"norm_eps": float(config_number(config, "layer_norm_epsilon", EPS))},
        )

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        return {
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "n_layer": shape.num_layers,
            "n_head": shape.num_heads,
            "layer_norm_epsilon": shape.options.get("norm_eps", EPS),
            "seq_length": shape.max_positions,
            "tie_word_embeddings": shape.tied_embeddings,
        }

    def decoder(self, shape: ModelShape) -> Decoder:
        mod, heads = ScoreMod(slopes=alibi_slopes(shape.num_heads)), shape.num_heads
        layer = layer_of(shape, _ACTIVATION, bias=True, blocks=heads, mod=mod)
        return decoder_of(shape, layer, embedding_norm=norm_of(shape))


FAMILIES = (Bloom(),)
