"""A GGUF file with exactly the weights of a Mixtral's checkpoint, for llama.cpp.

As llama.cpp's converter writes it: experts of a layer stacked, rows of queries and keys in the order in which ggml
rotates them, norms and routers in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from llama_cpp_runs import finish_gguf, gguf_writer
from torch import Tensor

from flexgen_bench.checkpoints.source import Source, open_source
from flexgen_bench.core.model import ModelShape


def write_mixture_gguf(folder: Path, target: Path) -> Path:
    """In bfloat16, from a folder in bfloat16; kept, and returned if it is there."""
    if target.exists():
        return target
    import gguf

    with open_source(folder) as source:
        shape = source.shape
        writer = gguf_writer(target, shape, float(shape.options["norm_eps"]), use_temp_file=True)
        writer.add_rope_freq_base(float(shape.options["rope_theta"]))
        writer.add_expert_count(int(shape.options["experts"]))
        writer.add_expert_used_count(int(shape.options["experts_per_token"]))

        def add(name: str, tensor: Tensor, wide: bool = False) -> None:
            """wide: in float32."""
            if wide:
                writer.add_tensor(f"{name}.weight", tensor.float().numpy())
            else:
                raw = tensor.contiguous().view(torch.int16).numpy().view(np.uint8)
                writer.add_tensor(f"{name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

        add("token_embd", source.tensor("embed_tokens.weight"))
        add("output_norm", source.tensor("norm.weight"), wide=True)
        add("output", source.tensor("lm_head.weight"))
        for number in range(shape.num_layers):
            for name, tensor, wide in _layer(source, number, shape):
                add(f"blk.{number}.{name}", tensor, wide)
        return finish_gguf(writer, target)


def _layer(source: Source, number: int, shape: ModelShape) -> Sequence[tuple[str, Tensor, bool]]:
    def tensor(name: str) -> Tensor:
        return source.tensor(f"layers.{number}.{name}.weight")

    def experts(name: str) -> Tensor:
        count = int(shape.options["experts"])
        return torch.stack([tensor(f"block_sparse_moe.experts.{expert}.{name}") for expert in range(count)])

    return (
        ("attn_norm", tensor("input_layernorm"), True),
        ("attn_q", _in_pairs(tensor("self_attn.q_proj"), shape.num_heads), False),
        ("attn_k", _in_pairs(tensor("self_attn.k_proj"), shape.num_kv_heads), False),
        ("attn_v", tensor("self_attn.v_proj"), False),
        ("attn_output", tensor("self_attn.o_proj"), False),
        ("ffn_norm", tensor("post_attention_layernorm"), True),
        ("ffn_gate_inp", tensor("block_sparse_moe.gate"), True),
        ("ffn_gate_exps", experts("w1"), False),
        ("ffn_up_exps", experts("w3"), False),
        ("ffn_down_exps", experts("w2"), False),
    )


def _in_pairs(rows: Tensor, heads: int) -> Tensor:
    """ggml rotates neighbours, transformers the two halves of a head."""
    halves = rows.view(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)
