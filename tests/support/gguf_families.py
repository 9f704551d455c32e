"""GGUF files of tiny random models of other families than Llama's, written as llama.cpp's converter writes them.

Names of tensors are the ``gguf`` package's own (its ``tensor_mapping``), so that this project's table is not compared
with itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.support.gguf_writing import Vocabulary, write_gguf

Arrays = dict[str, np.ndarray[Any, Any]]
_COMMON = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_LLAMA = _COMMON | {
    "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_MIXTURE = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_HEADS = {"attention.key_length": "head_dim", "attention.value_length": "head_dim"}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
# By architecture: keys of its namespace, from the config.
KEYS: Mapping[str, Mapping[str, str]] = {
    "llama": _LLAMA | _WINDOW | _HEADS,
    "mixtral": _LLAMA | _WINDOW | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    "qwen2moe": _LLAMA | _MIXTURE | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
    "qwen3moe": _LLAMA | _MIXTURE | _HEADS,
    "phi3": _LLAMA | _WINDOW | {"rope.scaling.original_context_length": "original_max_position_embeddings"},
    "gemma2": _LLAMA | _WINDOW | _HEADS | _CAPS,
    "gemma3": _LLAMA | _WINDOW | _HEADS,
    "bloom": _COMMON | {"attention.head_count_kv": "n_head", "attention.layer_norm_epsilon": "layer_norm_epsilon"},
}


def _rotated_in_pairs(name: str, values: np.ndarray[Any, Any], config: Any) -> np.ndarray[Any, Any]:
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if f".{part}." in name:
            halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
            return halves.swapaxes(1, 2).reshape(values.shape)
    return values


def _norms_with_one(name: str, values: np.ndarray[Any, Any], config: Any) -> np.ndarray[Any, Any]:
    return values + np.float32(1) if name.endswith("norm.weight") else values


def _queries_first(name: str, values: np.ndarray[Any, Any], config: Any) -> np.ndarray[Any, Any]:
    if "query_key_value" not in name:
        return values
    heads = values.reshape(config.n_head, 3, -1, *values.shape[1:])
    return heads.swapaxes(0, 1).reshape(values.shape)


CHANGES: Mapping[str, Callable[[str, np.ndarray[Any, Any], Any], np.ndarray[Any, Any]]] = {
    "llama": _rotated_in_pairs,
    "gemma2": _norms_with_one,
    "gemma3": _norms_with_one,
    "bloom": _queries_first,
}


def tensors_of(architecture: str, model: Any) -> Arrays:
    """The weights under ggml's names and in its order of rows."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    found: Arrays = {}
    for whole, parameter in model.named_parameters():
        name, values = whole, parameter.detach().numpy()
        if architecture in CHANGES:
            values = CHANGES[architecture](name, values, model.config)
        if name.endswith("experts.gate_up_proj"):  # two tensors there
            prefix, half = f"blk.{name.split('.')[2]}", values.shape[1] // 2
            found[f"{prefix}.ffn_gate_exps.weight"] = values[:, :half]
            found[f"{prefix}.ffn_up_exps.weight"] = values[:, half:]
            continue
        if name.endswith("experts.down_proj"):
            name = f"{name}.weight"
        # BLOOM's converter reads the bare decoder.
        stored = names.get_name(name.removeprefix("transformer."), try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        found[stored] = values[0] if "gate_inp_shexp" in stored else values
    return found


def write_family(
    path: Path,
    architecture: str,
    model: Any,
    vocabulary: Vocabulary,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> Path:
    """keys: of its namespace, beside those that follow from the config, or in their place (None leaves one out).
    tensors: beside the model's own."""
    config = model.config
    known = KEYS[config.model_type if config.model_type in KEYS else architecture]
    own = {key: getattr(config, name) for key, name in known.items()}
    own = {key: value for key, value in own.items() if value is not None} | dict(keys or {})
    all_keys = {"general.architecture": architecture} | {f"{architecture}.{key}": own[key] for key in own}
    stored = tensors_of(architecture, model) | dict(tensors or {})
    return write_gguf(path, all_keys | vocabulary.all_keys(), stored)


def randomised(model: Any, seed: int = 0) -> Any:
    """With weights, norms and biases of its own everywhere."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            around = 1.0 if parameter.ndim == 1 and float(parameter.abs().mean()) == 1.0 else 0.0
            parameter.copy_(torch.randn_like(parameter) * 0.15 + around)
    return model.eval()
