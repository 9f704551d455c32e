"""GLM-4 of 2024 (GLM Team) and ChatGLM 2 and 3, whose checkpoints have names and configs of their own; GLM-4 of 2025,
with norms after attention and MLP, too. Llama's form with neighbours rotated in half of each head, biases on queries,
keys and values, and gate and up in one matrix.

Options of ``ModelShape``: those of ``llama_like.py`` without mlp_bias, and rope_share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.models.family import config_flag, config_number, must_be
from flexgen_bench.models.inventory import Names, PartNames
from flexgen_bench.models.llama_like import LAYER_NAMES, LlamaLike
from flexgen_bench.models.parts import Layer
from flexgen_bench.models.rope import DEFAULT_THETA

_LAYER = LAYER_NAMES | {"gate_up": "mlp.gate_up_proj"}
_CHAT_LAYER: PartNames = {
    "attention_norm": "input_layernorm",
    "qkv": "self_attention.query_key_value",
    "out": "self_attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "gate_up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}


class Glm(LlamaLike):
    name = "glm"
    architecture = "GlmForCausalLM"
    model_type = "glm"
    names = Names(_LAYER)
    other_names: ClassVar[tuple[Names, ...]] = (
        Names(
            _CHAT_LAYER,
            layers="encoder.layers",
            tokens="embedding.word_embeddings",
            norm="encoder.final_layernorm",
            unembed="output_layer",
        ),
    )
    other_prefixes = ("transformer.", "")
    other_types: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "chatglm": ("ChatGLMModel", "ChatGLMForConditionalGeneration")
    }
    bias_keys = ("attention_bias",)
    qkv_bias, out_bias = True, False
    positions, head_dim, kv_heads = 131072, 128, 2
    eps = 0.00000015625
    interleaved, share = True, 0.5

    def shape_from_config(self, config: Mapping[str, Any], name: str) -> ModelShape:
        return super().shape_from_config(_words_of_glm(config), name)


class Glm4(Glm):
    name = "glm4"
    architecture = "Glm4ForCausalLM"
    model_type = "glm4"
    other_names = ()
    other_types: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    names = Names(_LAYER | {"attention_out_norm": "post_self_attn_layernorm", "mlp_out_norm": "post_mlp_layernorm"})

    def layer(self, shape: ModelShape, has_window: bool) -> Layer:
        norm = self.norm(shape)
        layer = super().layer(shape, has_window)
        return replace(layer, attention_out_norm=norm, mlp_out_norm=norm)


def _words_of_glm(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config of ChatGLM 2 or 3 in the words of transformers' GlmConfig; others as they are."""
    if str(config.get("model_type")).lower() != "chatglm":
        return config
    if config.get("kv_channels") is None:  # the first ChatGLM is another model
        raise UserError("config.json: kv_channels", None, "present: ChatGLM 2 and 3 can be read")
    must_be(
        config,
        "ChatGLM 2 or 3",
        rmsnorm=(True,),
        post_layer_norm=(True,),
        add_bias_linear=(False,),
        original_rope=(True,),
        apply_residual_connection_post_layernorm=(False,),
        pre_seq_len=(None,),
        multi_query_attention=(True,),
    )
    if config.get("rope_ratio") not in (1, None):
        allowed = "1: ChatGLM 2 divides positions by it, ChatGLM 3 and GLM-4 multiply the base with it"
        raise UserError(
            "config.json: rope_ratio", config["rope_ratio"], allowed, "Use the checkpoint made for transformers (-hf)."
        )
    return {
        "hidden_size": config.get("hidden_size"),
        "num_attention_heads": config.get("num_attention_heads"),
        "head_dim": config["kv_channels"],
        "num_hidden_layers": config.get("num_layers"),
        "intermediate_size": config.get("ffn_hidden_size"),
        "num_key_value_heads": config.get("multi_query_group_num", 1),
        "vocab_size": config.get("padded_vocab_size"),
        "max_position_embeddings": config.get("seq_length", 2048),
        "rms_norm_eps": float(config_number(config, "layernorm_epsilon", 1e-5)),
        "hidden_act": "silu",
        "attention_bias": config_flag(config, "add_qkv_bias", False),
        "rope_theta": DEFAULT_THETA,
        "tie_word_embeddings": config_flag(config, "tie_word_embeddings", False),
    }


FAMILIES = (Glm(), Glm4())
