"""Which architectures of GGUF files can be read, and where their files have the tensors of transformers: ggml's names,
the order of rows, and what converters add (llama.cpp: gguf-py/gguf/constants.py and convert_hf_to_gguf.py)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from flexgen_bench.checkpoints.gguf.header import GGUFHeader
from flexgen_bench.core.errors import StoreError


class RowOrder(StrEnum):
    """How a file orders rows that transformers has head by head."""

    SAME = "same"
    PAIRS = "pairs"  # within a head: ggml rotates neighbours, transformers the two halves
    BY_KIND = "by kind"  # the queries of all heads, then their keys, then their values


@dataclass(frozen=True)
class Stored:
    """Where a file has a tensor of transformers. name: ggml's. expert: of several that are stacked there, which.
    order: of its rows, of so many ``heads``. added: what the file's values have on top. is_vector: whether it is a
    matrix of one row, of which the file has that row."""

    name: str
    expert: int | None = None
    order: RowOrder = RowOrder.SAME
    heads: int = 0
    added: float = 0.0
    is_vector: bool = False


@dataclass(frozen=True)
class Architecture:
    """name: ``general.architecture``, and the namespace of its keys. once, layer: transformers' names without
    ``.weight`` and ``.bias``, to ggml's, ``{}`` for the number of an expert. query, key: the parts whose rows are in
    ``order``, of so many query or key heads. around_one: whether norms are stored with the 1 that transformers adds to
    them. of_config: tensors that are part of the config, which says what they mean. reads: keys that only it has."""

    name: str
    once: Mapping[str, str]
    layer: Mapping[str, str]
    layers: str = "model.layers"
    order: RowOrder = RowOrder.SAME
    query: str = ""
    key: str = ""
    around_one: bool = False
    of_config: Collection[str] = ()
    reads: frozenset[str] = field(default=frozenset())

    def stored(self, name: str, heads: int, kv_heads: int) -> Stored:
        """Where the tensor is that transformers calls ``name``."""
        stem, _, ending = name.rpartition(".")
        added = 1.0 if self.around_one and stem.endswith("norm") else 0.0
        if stem in self.once:
            return Stored(f"{self.once[stem]}.{ending}", added=added)
        match = re.fullmatch(rf"{re.escape(self.layers)}\.(\d+)\.(.+)", stem)
        whole = match[2] if match else ""
        expert = _EXPERT.search(whole)
        part = _EXPERT.sub(".experts.{}.", whole)
        if match is None or part not in self.layer:
            raise StoreError(f"{name} has no place in GGUF files of {self.name} models.")
        counts = {self.query: heads, self.key: kv_heads} if self.order is not RowOrder.SAME else {}
        return Stored(
            f"blk.{match[1]}.{self.layer[part]}.{ending}",
            None if expert is None else int(expert[1]),
            self.order if part in counts else RowOrder.SAME,
            counts.get(part, 0),
            added,
            part in _VECTORS,
        )


_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_VECTORS = ("mlp.shared_expert_gate",)
# Factors of the rotary frequencies.
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"

_ONCE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LLAMA = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_MIXTRAL = {
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.{}.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.{}.w2": "ffn_down_exps",
    "block_sparse_moe.experts.{}.w3": "ffn_up_exps",
}
_QWEN_MOE = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.{}.gate_proj": "ffn_gate_exps",
    "mlp.experts.{}.down_proj": "ffn_down_exps",
    "mlp.experts.{}.up_proj": "ffn_up_exps",
}
_SHARED = {
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_PHI3 = {name: part for name, part in _LLAMA.items() if not name.startswith("mlp.")} | {
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA = _LLAMA | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_COUNTS = frozenset(("expert_count", "expert_used_count"))
_WIDTHS = frozenset(("expert_feed_forward_length", "expert_shared_feed_forward_length"))
_WINDOWS = frozenset(("attention.sliding_window", "attention.sliding_window_pattern"))

ARCHITECTURES = {
    one.name: one
    for one in (
        # Mistral's and Mixtral's files are those of a Llama.
        Architecture(
            "llama",
            _ONCE,
            _LLAMA | _MIXTRAL,
            order=RowOrder.PAIRS,
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            of_config=(ROPE_FACTORS,),
            reads=_COUNTS,
        ),
        Architecture("qwen2", _ONCE, _LLAMA, of_config=(ROPE_FACTORS,)),
        Architecture("qwen3", _ONCE, _LLAMA, of_config=(ROPE_FACTORS,)),
        Architecture(
            "qwen2moe", _ONCE, _LLAMA | _QWEN_MOE | _SHARED, of_config=(ROPE_FACTORS,), reads=_COUNTS | _WIDTHS
        ),
        Architecture("qwen3moe", _ONCE, _LLAMA | _QWEN_MOE, of_config=(ROPE_FACTORS,), reads=_COUNTS | _WIDTHS),
        Architecture("phi3", _ONCE, _PHI3, of_config=(LONG_FACTORS, SHORT_FACTORS)),
        Architecture(
            "gemma2",
            _ONCE,
            _GEMMA,
            around_one=True,
            reads=_WINDOWS | {"attn_logit_softcapping", "final_logit_softcapping"},
        ),
        Architecture(
            "gemma3", _ONCE, _GEMMA, around_one=True, reads=_WINDOWS | {"final_logit_softcapping", "rope.freq_base_swa"}
        ),
        Architecture(
            "bloom",
            {
                "transformer.word_embeddings": "token_embd",
                "transformer.word_embeddings_layernorm": "token_embd_norm",
                "transformer.ln_f": "output_norm",
                "lm_head": "output",
            },
            {
                "input_layernorm": "attn_norm",
                "self_attention.query_key_value": "attn_qkv",
                "self_attention.dense": "attn_output",
                "post_attention_layernorm": "ffn_norm",
                "mlp.dense_h_to_4h": "ffn_up",
                "mlp.dense_4h_to_h": "ffn_down",
            },
            layers="transformer.h",
            order=RowOrder.BY_KIND,
            query="self_attention.query_key_value",
            reads=frozenset(("attention.layer_norm_epsilon", "attention.max_alibi_bias")),
        ),
    )
}


def architecture_of(header: GGUFHeader) -> Architecture:
    """Raises StoreError for one that cannot be read."""
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise StoreError(
            f"{header.path}: general.architecture is {architecture!r}; {known} can be read. "
            "Use the checkpoint that the file was converted from, if its family is supported."
        )
    return ARCHITECTURES[architecture]
