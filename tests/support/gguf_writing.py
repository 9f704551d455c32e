"""GGUF files for tests: small random Llamas with real tokenizers, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
_IN_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_ONCE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of its tokenizer. ``keys`` are added to those that follow from the rest."""

    model: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    keys: Mapping[str, Any] | None = None

    def all_keys(self) -> dict[str, Any]:
        own_keys: dict[str, Any] = {"model": self.model, "tokens": list(self.tokens), "token_type": list(self.kinds)}
        if self.model == "gpt2":
            own_keys["merges"] = list(self.merges)
        if self.scores:
            own_keys["scores"] = list(self.scores)
        return {
            f"tokenizer.ggml.{key}": value
            for key, value in (own_keys | dict(self.keys or {})).items()
            if value is not None
        }


def byte_level(texts: Sequence[str], size: int = 1200, **keys: Any) -> Vocabulary:
    """Merges that were learned without cutting words: they cross every border, so that ids show where words are cut."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    learned.train_from_iterator(_plain(texts), trainer)
    model = json.loads(learned.to_str())["model"]
    special = ["<|begin|>", "<|end_of_text|>", "<|user|>"]
    tokens = [*special, *sorted(model["vocab"], key=model["vocab"].__getitem__)]
    kinds = [CONTROL, CONTROL, USER_DEFINED] + [NORMAL] * (len(tokens) - 3)
    return Vocabulary(
        "gpt2",
        tuple(tokens),
        tuple(kinds),
        tuple(" ".join(pair) for pair in model["merges"]),
        keys={"pre": "smollm", "bos_token_id": 0, "eos_token_id": 1} | keys,
    )


def sentencepiece(texts: Sequence[str], size: int = 1200, **keys: Any) -> Vocabulary:
    """Pieces with scores, characters and bytes, in the order of Llama 2's vocabulary."""
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned.train_from_iterator(
        _plain(texts), trainers.BpeTrainer(vocab_size=size, min_frequency=2, show_progress=False)
    )
    vocab = json.loads(learned.to_str())["model"]["vocab"]
    # Some characters are left to the bytes.
    letters = {text for text in vocab if len(text) == 1 and ord(text) < 0x3000}
    pieces = [text for text in vocab if len(text) > 1 and letters.issuperset(text)]
    normal = [*sorted(pieces, key=vocab.__getitem__), *sorted(letters)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *normal, "[INST]"]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(normal) + [USER_DEFINED]
    scores = [0.0] * 259 + [-float(n) for n in range(len(normal))] + [0.0]
    return Vocabulary("llama", tuple(tokens), tuple(kinds), scores=tuple(scores), keys=keys)


def _plain(texts: Sequence[str]) -> list[str]:
    """What merges are learned from: not the texts of special tokens, which would be in the vocabulary twice."""
    return [text for text in texts if not any(mark in text for mark in ("<", "[INST]"))] * 2


def tiny_llama(vocab_size: int, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama whose answers depend on positions, in float32."""
    torch.manual_seed(seed)
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
    }
    model = LlamaForCausalLM(LlamaConfig(**(values | changes))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.1)
    return model


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray[Any, Any]]:
    """The weights under ggml's names, rows of queries and keys in ggml's order."""
    config, tensors = model.config, {}
    permuted = config.model_type == "llama"
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if permuted else {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        for projection, count in heads.items():
            if f".{projection}." in name:
                halves = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        if name in _ONCE:
            tensors[_ONCE[name]] = values
        else:
            _, _, layer, *middle, part = name.split(".")
            tensors[f"blk.{layer}.{_IN_LAYER['.'.join(middle)]}.{part}"] = values
    return tensors


def llama_keys(config: LlamaConfig) -> dict[str, Any]:
    """The metadata of a Llama, or of what has its form, without scaled positions."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = {
        "general.architecture": "llama",
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "llama.vocab_size": config.vocab_size,
    }
    space = str(config.model_type)
    return {key.replace("llama.", f"{space}."): value for key, value in keys.items()} | {"general.architecture": space}


def write_gguf(
    path: Path,
    keys: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray[Any, Any]],
    kinds: Mapping[str, Kind] | None = None,
) -> Path:
    """Write a file as it is told. Keys of value None are left out. kinds: of quantized tensors, whose values are
    bytes."""
    writer = gguf.GGUFWriter(path, str(keys.get("general.architecture", "llama")))
    for key, value in keys.items():
        if key == "general.architecture" or value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_llama(path: Path, model: LlamaForCausalLM, vocabulary: Vocabulary, **changed: Any) -> Path:
    """The model in float32. changed: keys of the metadata, "__" for the dot; None leaves one out."""
    keys = llama_keys(model.config) | vocabulary.all_keys()
    keys |= {key.replace("__", "."): value for key, value in changed.items()}
    return write_gguf(path, keys, gguf_tensors(model))
