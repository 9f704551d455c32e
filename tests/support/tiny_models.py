"""Tiny random checkpoints of awkward shapes, machines to run them on, and what transformers generates with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flexgen_bench.core.hardware import Accelerator, HardwareProfile

VOCAB = 131
HOST = HardwareProfile("cpu", Accelerator.NONE)
EMULATED = HardwareProfile("emulated", Accelerator.EMULATED, gpu_memory_bytes=2**28, links={"h2d": 4e9, "d2h": 4e9})


def _opt(**changes: Any) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    settings = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "ffn_dim": 100,
        "word_embed_proj_dim": 48,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
    }
    return OPTForCausalLM(OPTConfig(**(settings | changes)))


def _llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "hidden_size": 60,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "intermediate_size": 90,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


MODELS: dict[str, Callable[[], Any]] = {
    "opt": _opt,
    "opt-350m-like": lambda: _opt(do_layer_norm_before=False, word_embed_proj_dim=20),
    "opt-no-bias": lambda: _opt(enable_bias=False, activation_function="gelu"),
    "llama-multi-query": _llama,
    "llama-tied-grouped": lambda: _llama(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama-scaled-rope": lambda: _llama(
        num_key_value_heads=5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
}


def random_model(name: str, seed: int = 0) -> Any:
    """A model with weights large enough that greedy tokens vary and ties do not occur."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = "norm" in parameter_name and parameter_name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (1.0 if is_norm else 0.0))
    return model.eval()


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def greedy_reference(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, cache: Callable[[], Any] = lambda: None
) -> list[list[int]]:
    """Greedy tokens of transformers, one prompt at a time: no padding is involved. cache: makes each prompt's KV cache;
    None is transformers' own."""
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                pad_token_id=1,
                eos_token_id=None,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                past_key_values=cache(),
            )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB, (n,), generator=generator).tolist() for n in lengths]
