"""The config of each architecture of GGUF files, in the words of its family's ``config.json``.

What a file does not state is what llama.cpp takes (src/llama-model.cpp, ``load_hparams``), which is what its converter
left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from flexgen_bench.checkpoints.gguf.metadata import Metadata
from flexgen_bench.checkpoints.gguf.rope import longrope_parameters, rope_parameters

_WINDOW, _SCALE, _ALIBI = "attention.sliding_window", "attention.scale", "attention.max_alibi_bias"
_EXPERTS, _PER_TOKEN = "expert_count", "expert_used_count"
_PATTERN = "attention.sliding_window_pattern"
# Of the largest Gemma 2 and 3, whose scores are divided by the root of hidden / heads instead of the head's size.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
_GEMMA2_WINDOW = 4096
_GEMMA2_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_LOCAL_THETA = 10_000.0
_ALIBI_REACH = 8.0  # of the slopes; llama.cpp's own where BLOOM's files do not say


def _named(architecture: str, model_type: str) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type}


def _llama_like(get: Metadata) -> dict[str, Any]:
    """What all families of Llama's form state, but for positions and biases."""
    hidden, heads = get.count("embedding_length"), get.count("attention.head_count")
    head_dim = get.count("attention.key_length", hidden // heads)
    get.must_be("attention.value_length", head_dim)
    return {
        "hidden_size": hidden,
        "num_hidden_layers": get.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": get.count("feed_forward_length"),
        "vocab_size": get.vocab_size(),
        "max_position_embeddings": get.count("context_length"),
        "rms_norm_eps": get.decimal("attention.layer_norm_rms_epsilon"),
    }


def _check_scale(get: Metadata, scale: float) -> None:
    stated = get.number(_SCALE, 0.0)
    if stated and not math.isclose(stated, scale, rel_tol=1e-6):
        raise get.refused(_SCALE, f"0 or {scale:g}, what this model's scores are multiplied with")


def _llama(get: Metadata) -> dict[str, Any]:
    """Llama; Mistral where it has a window that texts can leave, Mixtral where it has experts."""
    config = _plain(get)
    window = _binding_window(get, config)
    if window and (config["attention_bias"] or config["mlp_bias"]):
        raise get.refused(_WINDOW, "0 in a model whose layers have biases")
    if get.count(_EXPERTS, 0):
        counts = {"num_local_experts": get.count(_EXPERTS), "num_experts_per_tok": get.count(_PER_TOKEN)}
        return config | counts | _named("MixtralForCausalLM", "mixtral") | {"sliding_window": window}
    if window:
        return config | _named("MistralForCausalLM", "mistral") | {"sliding_window": window}
    return config | _named("LlamaForCausalLM", "llama")


def _qwen(model: str, model_type: str) -> Callable[[Metadata], dict[str, Any]]:
    def read(get: Metadata) -> dict[str, Any]:
        return _without_window(get) | _named(model, model_type)

    return read


def _qwen_moe(model: str, model_type: str, renormalised: bool) -> Callable[[Metadata], dict[str, Any]]:
    """renormalised: what llama.cpp does; files do not say it."""

    def read(get: Metadata) -> dict[str, Any]:
        config = _without_window(get)
        widths = {"moe_intermediate_size": get.count("expert_feed_forward_length")}
        if get.has_tensor("ffn_up_shexp", "weight"):
            widths["shared_expert_intermediate_size"] = get.count("expert_shared_feed_forward_length")
        return (
            config
            | widths
            | _named(model, model_type)
            | {
                "num_experts": get.count(_EXPERTS),
                "num_experts_per_tok": get.count(_PER_TOKEN),
                "norm_topk_prob": renormalised,
                "qkv_bias": config["attention_bias"],
                "decoder_sparse_step": 1,
            }
        )

    return read


def _without_window(get: Metadata) -> dict[str, Any]:
    config = _plain(get)
    if _binding_window(get, config):
        raise get.refused(_WINDOW, "0, or at least the positions that the model can see")
    return config


def _binding_window(get: Metadata, config: Mapping[str, Any]) -> int | None:
    """The window, if texts can leave it."""
    window = get.count(_WINDOW, 0)
    reach = config["max_position_embeddings"] * config["rope_parameters"].get("factor", 1.0)
    return window if 0 < window < reach else None


def _plain(get: Metadata) -> dict[str, Any]:
    """Whole heads rotated, biases where tensors are."""
    config = _llama_like(get)
    head_dim = config["head_dim"]
    get.must_be("rope.dimension_count", head_dim)
    _check_scale(get, head_dim**-0.5)
    return config | {
        "hidden_act": "silu",
        "attention_bias": get.has_tensor("attn", "bias"),
        "mlp_bias": get.has_tensor("ffn", "bias"),
        "rope_parameters": rope_parameters(get.header, head_dim, config["max_position_embeddings"]),
    }


def _phi3(get: Metadata) -> dict[str, Any]:
    config = _llama_like(get)
    head_dim, positions = config["head_dim"], config["max_position_embeddings"]
    _check_scale(get, head_dim**-0.5)
    rotated = get.count("rope.dimension_count", head_dim)
    if rotated > head_dim or rotated % 2:
        raise get.refused("rope.dimension_count", f"even, and at most {head_dim}, the size of a head")
    original = get.count("rope.scaling.original_context_length", positions)
    return (
        config
        | _named("Phi3ForCausalLM", "phi3")
        | {
            "hidden_act": "silu",
            "sliding_window": get.count(_WINDOW, 0) or None,
            "original_max_position_embeddings": original,
            "rope_theta": get.number("rope.freq_base", 10000.0),
            "partial_rotary_factor": rotated / head_dim,
            "rope_scaling": longrope_parameters(get.header, rotated, positions, original),
        }
    )


def _gemma(get: Metadata) -> dict[str, Any]:
    """What Gemma 2 and 3 share: scores, and which layers have a window."""
    config = _llama_like(get)
    head_dim, layers = config["head_dim"], config["num_hidden_layers"]
    get.must_be("rope.dimension_count", head_dim)
    largest = layers == _LARGEST_GEMMA[get.space]
    scalar = config["hidden_size"] // config["num_attention_heads"] if largest else head_dim
    _check_scale(get, scalar**-0.5)
    return config | {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": scalar}


def _gemma_windows(get: Metadata, layers: int, window: int, period: int) -> dict[str, Any]:
    """period: every so many layers one sees the whole text, unless the file states which."""
    pattern = get.get(_PATTERN)
    if isinstance(pattern, list):
        if len(pattern) != layers or not all(isinstance(has_window, bool) for has_window in pattern):
            raise get.refused(_PATTERN, f"a whole number, or true or false for each of the {layers} layers")
        windowed = pattern
    else:
        period = get.count(_PATTERN, period)
        windowed = [(number + 1) % period != 0 for number in range(layers)]
    if not window:
        windowed = [False] * layers
    kinds = ["sliding_attention" if has_window else "full_attention" for has_window in windowed]
    return {"sliding_window": window or None, "layer_types": kinds}


def _gemma2(get: Metadata) -> dict[str, Any]:
    config = _gemma(get)
    windows = _gemma_windows(get, config["num_hidden_layers"], get.count(_WINDOW, _GEMMA2_WINDOW), 2)
    caps = {key: get.number(key, default) for key, default in _GEMMA2_CAPS.items()}
    scaled = rope_parameters(get.header, config["head_dim"], config["max_position_embeddings"])
    return config | windows | caps | _named("Gemma2ForCausalLM", "gemma2") | {"rope_parameters": scaled}


def _gemma3(get: Metadata) -> dict[str, Any]:
    config = _gemma(get)
    windows = _gemma_windows(get, config["num_hidden_layers"], get.count(_WINDOW, 0), 6)
    local = {"rope_type": "default", "rope_theta": get.number("rope.freq_base_swa", _LOCAL_THETA)}
    full = rope_parameters(get.header, config["head_dim"], config["max_position_embeddings"], theta=1_000_000.0)
    return (
        config
        | windows
        | _named("Gemma3ForCausalLM", "gemma3_text")
        | {
            "final_logit_softcapping": get.number("final_logit_softcapping", 0.0) or None,
            "rope_parameters": {"full_attention": full, "sliding_attention": local},
        }
    )


def _bloom(get: Metadata) -> dict[str, Any]:
    hidden, heads = get.count("embedding_length"), get.count("attention.head_count")
    get.must_be("attention.head_count_kv", heads, "as many as query heads")
    get.must_be("feed_forward_length", 4 * hidden, "four times the hidden size")
    get.must_be("attention.key_length", hidden // heads)
    get.must_be("attention.value_length", hidden // heads)
    if get.number(_ALIBI, _ALIBI_REACH) != _ALIBI_REACH:
        raise get.refused(_ALIBI, f"{_ALIBI_REACH:g}")
    if get.count(_WINDOW, 0):
        raise get.refused(_WINDOW, "0")
    _check_scale(get, (hidden // heads) ** -0.5)
    return _named("BloomForCausalLM", "bloom") | {
        "hidden_size": hidden,
        "n_layer": get.count("block_count"),
        "n_head": heads,
        "vocab_size": get.vocab_size(),
        "layer_norm_epsilon": get.decimal("attention.layer_norm_epsilon"),
        "seq_length": get.count("context_length"),
    }


READERS: Mapping[str, Callable[[Metadata], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen("Qwen2ForCausalLM", "qwen2"),
    "qwen3": _qwen("Qwen3ForCausalLM", "qwen3"),
    "qwen2moe": _qwen_moe("Qwen2MoeForCausalLM", "qwen2_moe", renormalised=False),
    "qwen3moe": _qwen_moe("Qwen3MoeForCausalLM", "qwen3_moe", renormalised=True),
    "phi3": _phi3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "bloom": _bloom,
}
