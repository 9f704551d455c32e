"""Which architectures of GGUF files can be read, and what their tensors are called there (ggml's names) and here
(transformers')."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flexgen_bench.checkpoints.gguf.header import GGUFHeader
from flexgen_bench.core.errors import StoreError

_ONCE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
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
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
# Factors of the rotary frequencies; what they mean is part of the config (config.py).
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """name: ``general.architecture``, and the namespace of its keys. model, model_type: of transformers. permuted:
    whether rows of queries and keys are in ggml's order, which rotates neighbours."""

    name: str
    model: str
    model_type: str
    permuted: bool


# Mistral's files are those of a Llama.
ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture("llama", "LlamaForCausalLM", "llama", permuted=True),
        Architecture("qwen2", "Qwen2ForCausalLM", "qwen2", permuted=False),
        Architecture("qwen3", "Qwen3ForCausalLM", "qwen3", permuted=False),
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


def gguf_name(name: str) -> str:
    """ggml's name of a tensor of a model of one of these architectures."""
    if name in _ONCE:
        return _ONCE[name]
    match = _LAYER.fullmatch(name)
    assert match is not None, f"{name} is not a tensor of these architectures"
    return f"blk.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"
