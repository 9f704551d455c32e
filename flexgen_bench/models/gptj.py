"""GPT-J (Wang & Komatsuzaki 2021): attention and MLP side by side behind one norm, neighbours rotated, a bias on the
head. CodeGen (Nijkamp et al. 2022): the same with queries, values and keys of each of four blocks of heads in one
matrix.

Options of ``ModelShape``: norm_eps, activation, rotary_dim (rotated values of a head).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.activations import activation_of
from flexgen_bench.models.family import ModelFamily, config_flag, config_number
from flexgen_bench.models.gpt_like import EPS, decoder_of, head_dim_of, layer_of, named
from flexgen_bench.models.inventory import Names, PartNames
from flexgen_bench.models.parts import Decoder, Rotary
from flexgen_bench.models.rope import DEFAULT_THETA

_LAYER: PartNames = {
    "attention_norm": "ln_1",
    "qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "out": "attn.out_proj",
    "up": "mlp.fc_in",
    "down": "mlp.fc_out",
}


class GPTJ(ModelFamily):
    name = "gptj"
    architecture = "GPTJForCausalLM"
    model_type = "gptj"
    prefixes = ("transformer.", "")
    names = Names(_LAYER, layers="h", tokens="wte", norm="ln_f")
    blocks, order = 1, "qkv"

    def shape_from_config(self, config: Mapping[str, Any], name: str) -> ModelShape:
        hidden = named(config, "n_embd", "hidden_size")
        heads = named(config, "n_head", "num_attention_heads")
        head_dim, dim = head_dim_of(hidden, heads, "n_head"), named(config, "rotary_dim")
        if dim % 2 or not 0 < dim <= head_dim:
            raise UserError("config.json: rotary_dim", dim, f"even, and at most {head_dim}")
        if heads % self.blocks:
            raise UserError("config.json: n_head", heads, f"a multiple of {self.blocks}")
        activation = config.get("activation_function", "gelu_new")
        return ModelShape(
            name=name,
            family=self.name,
            num_layers=named(config, "n_layer", "num_hidden_layers"),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            ffn_size=int(config_number(config, "n_inner", 4 * hidden)),
            vocab_size=named(config, "vocab_size"),
            max_positions=named(config, "n_positions", "max_position_embeddings"),
            tied_embeddings=config_flag(config, "tie_word_embeddings", False),
            options={
                "norm_eps": float(config_number(config, "layer_norm_epsilon", EPS)),
                "activation": activation_of("config.json: activation_function", activation),
                "rotary_dim": dim,
            },
        )

    def config_from_shape(self, shape: ModelShape) -> dict[str, Any]:
        return {
            "vocab_size": shape.vocab_size,
            "n_positions": shape.max_positions,
            "n_embd": shape.hidden_size,
            "n_layer": shape.num_layers,
            "n_head": shape.num_heads,
            "n_inner": shape.ffn_size,
            "rotary_dim": shape.options.get("rotary_dim", 64),
            "layer_norm_epsilon": shape.options.get("norm_eps", EPS),
            "activation_function": shape.options.get("activation", "gelu_new"),
            "tie_word_embeddings": shape.tied_embeddings,
        }

    def decoder(self, shape: ModelShape) -> Decoder:
        dim = int(shape.options.get("rotary_dim", 64))
        layer = layer_of(
            shape, "gelu_new", bias=False, parallel=True, own_norm=False, blocks=self.blocks, order=self.order, rotary=0
        )
        rotary = Rotary(dim, DEFAULT_THETA, interleaved=True)
        return decoder_of(shape, layer, head_bias=True, rotaries=(rotary,))


class CodeGen(GPTJ):
    name = "codegen"
    architecture = "CodeGenForCausalLM"
    model_type = "codegen"
    names = Names(_LAYER | {"qkv": "attn.qkv_proj"}, layers="h", tokens="wte", norm="ln_f")
    blocks, order = 4, "qvk"


FAMILIES = (GPTJ(), CodeGen())
