"""What the tensors of a Llama are called in a GGUF file (ggml's names) and here (transformers')."""

from __future__ import annotations

import re

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
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
# Factors of the rotary frequencies; what they mean is part of the config (config.py).
ROPE_FACTORS = "rope_freqs.weight"


def gguf_name(name: str) -> str:
    """ggml's name of a tensor of ``LlamaForCausalLM``."""
    if name in _ONCE:
        return _ONCE[name]
    match = _LAYER.fullmatch(name)
    assert match is not None, f"{name} is not a tensor of a Llama"
    return f"blk.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"
