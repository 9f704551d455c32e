"""Tiny random checkpoints of awkward shapes, machines to run them on, and what transformers generates with them."""

from __future__ import annotations

import re
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


# Of other families, below: hidden sizes, heads and widths that are no multiples of each other's, as far as the form
# allows.
_ODD = {
    "hidden_size": 60,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 90,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_GPT = {
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": VOCAB,
    "n_inner": 100,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_MIXTURE = {"num_hidden_layers": 3, "num_experts_per_tok": 3}
_NEOX = {k: v for k, v in _ODD.items() if k not in ("head_dim", "num_key_value_heads")} | {"num_attention_heads": 5}


def _of(kind: str, **settings: Any) -> Any:
    """A model of transformers' config class ``<kind>Config``."""
    import transformers

    model, config = (getattr(transformers, kind + name) for name in ("ForCausalLM", "Config"))
    if kind == "Gemma3":
        config = transformers.Gemma3TextConfig
    return model(config(**settings))


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
# One or two of every other family, with everything it has: windows that prompts leave, caps that bind, shares of heads
# that are rotated.
FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen2": lambda: _of("Qwen2", **_ODD),
    "qwen2-windows": lambda: _of("Qwen2", **_ODD, use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": lambda: _of("Qwen3", **_ODD | {"num_key_value_heads": 3}),
    "mistral": lambda: _of("Mistral", **_ODD, sliding_window=6),
    "phi3": lambda: _of(
        "Phi3", **_ODD, sliding_window=9, rope_parameters={"rope_theta": 700.0, "partial_rotary_factor": 0.5}
    ),
    "gemma2": lambda: _of(
        "Gemma2",
        **_ODD,
        sliding_window=5,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=20.0,
    ),
    "gemma3": lambda: _of("Gemma3", **_ODD, sliding_window=5, sliding_window_pattern=3, query_pre_attn_scalar=20),
    "glm": lambda: _of("Glm", **_ODD),
    "glm4": lambda: _of("Glm4", **_ODD | {"num_key_value_heads": 6}),
    "gptj": lambda: _of("GPTJ", **_GPT, rotary_dim=4),
    "codegen": lambda: _of("CodeGen", **_GPT | {"n_embd": 80, "n_head": 8}, rotary_dim=6, tie_word_embeddings=True),
    "gpt-neox": lambda: _of("GPTNeoX", **_NEOX, rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    "gpt-neox-serial": lambda: _of(
        "GPTNeoX",
        **_NEOX | {"tie_word_embeddings": True},
        use_parallel_residual=False,
        attention_bias=False,
        rope_parameters={"rope_theta": 300.0, "partial_rotary_factor": 1.0},
    ),
    "mixtral": lambda: _of(
        "Mixtral",
        **_ODD | _MIXTURE | {"num_key_value_heads": 3, "intermediate_size": 44},
        sliding_window=6,
        num_local_experts=5,
    ),
    "gpt-oss": lambda: _of(
        "GptOss",
        **_ODD | _MIXTURE | {"intermediate_size": 44},
        num_local_experts=5,
        sliding_window=5,
        swiglu_limit=0.6,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 700.0,
            "factor": 4.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    ),
    "qwen3-moe": lambda: _of(
        "Qwen3Moe",
        **_ODD | _MIXTURE | {"num_key_value_heads": 3},
        num_experts=6,
        moe_intermediate_size=20,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=5,
        attention_bias=True,
    ),
    "qwen2-moe": lambda: _of(
        "Qwen2Moe",
        **_ODD | _MIXTURE,
        num_experts=6,
        moe_intermediate_size=20,
        shared_expert_intermediate_size=52,
        decoder_sparse_step=2,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=2,
    ),
    "glm4-moe": lambda: _of(
        "Glm4Moe",
        **_ODD | _MIXTURE,
        n_routed_experts=6,
        moe_intermediate_size=20,
        n_group=3,
        topk_group=2,
        n_shared_experts=2,
        routed_scaling_factor=1.6,
        use_qk_norm=True,
        attention_bias=True,
    ),
    "bloom": lambda: _of("Bloom", hidden_size=60, n_layer=3, n_head=5, vocab_size=VOCAB),
}


def random_model(name: str, seed: int = 0) -> Any:
    """A model with weights large enough that greedy tokens vary and ties do not occur."""
    torch.manual_seed(seed)
    return with_random_weights((MODELS | FAMILIES)[name](), name)


def with_random_weights(model: Any, name: str) -> Any:
    """The same of any model; name: with its family in it."""
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = re.search(r"(norm|ln_1|ln_f)\.weight$", parameter_name)
            around = 1.0 if is_norm and "gemma" not in name else 0.0
            parameter.copy_(torch.randn_like(parameter) * 0.15 + around)
        for buffer_name, buffer in model.named_buffers():
            if "correction" in buffer_name:  # so that experts are chosen that do not weigh most
                buffer.copy_(torch.randn_like(buffer) * 0.5)
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
