"""The same weights under the names that other checkpoints of a family have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_family_configs import ours
from torch import Tensor
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.checkpoints.source import open_source
from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.model import DType
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.llm.llm import LLM
from tests.support.shapes import no_progress
from tests.support.tiny_models import VOCAB, greedy_reference, random_model, random_prompts, save

PROMPTS, NEW_TOKENS = random_prompts([2, 13, 30]), 4


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> Path:
    """The checkpoint with other tensors, and entries of its config changed (None: left out)."""
    file = folder / "model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file)
    found = json.loads((folder / "config.json").read_text()) | config
    text = json.dumps({k: v for k, v in found.items() if v is not None})
    (folder / "config.json").write_text(text)
    return folder


def as_cell(folder: Path) -> Path:
    """The folder that other systems are given."""
    with open_source(folder) as source:
        spec = ModelSpec(source.shape, WeightSource.PATH, str(folder))
    return prepare_checkpoint(spec, DType.FLOAT32, folder.parent / "cells", no_progress)


def in_transformers(folder: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return greedy_reference(model.eval(), PROMPTS, NEW_TOKENS)


def chatglm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Glm in the words of ChatGLM 2 and 3: queries, keys and values in one matrix."""
    names = {
        r"^model\.embed_tokens": "transformer.embedding.word_embeddings",
        r"^model\.norm": "transformer.encoder.final_layernorm",
        r"^lm_head": "transformer.output_layer",
        r"^model\.layers": "transformer.encoder.layers",
        r"self_attn\.o_proj": "self_attention.dense",
        r"mlp\.gate_up_proj": "mlp.dense_h_to_4h",
        r"mlp\.down_proj": "mlp.dense_4h_to_h",
    }
    found: dict[str, Tensor] = {"transformer.rotary_pos_emb.inv_freq": torch.zeros(3)}
    for name, tensor in tensors.items():
        if "q_proj" in name:
            parts = [tensors[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            name, tensor = name.replace("self_attn.q_proj", "self_attention.query_key_value"), torch.cat(parts)  # noqa: PLW2901
        for old, new in names.items():
            name = re.sub(old, new, name)  # noqa: PLW2901
        if "_proj" not in name:
            found[name] = tensor
    return found


CHATGLM = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "num_layers": 4,
    "num_hidden_layers": None,
    "hidden_size": 60,
    "ffn_hidden_size": 90,
    "intermediate_size": None,
    "kv_channels": 12,
    "head_dim": None,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_key_value_heads": None,
    "padded_vocab_size": 131,
    "vocab_size": 131,
    "seq_length": 64,
    "layernorm_epsilon": 0.00000015625,
    "rms_norm_eps": None,
    "rope_parameters": None,
    "add_qkv_bias": True,
    "rmsnorm": True,
    "add_bias_linear": False,
    "post_layer_norm": True,
    "original_rope": True,
    "apply_residual_connection_post_layernorm": False,
    "max_position_embeddings": None,
    "rope_ratio": 1,
}


@pytest.mark.parametrize("architecture", ["ChatGLMModel", "ChatGLMForConditionalGeneration"])
def test_chatglm(architecture: str, tmp_path: Path) -> None:
    model = random_model("glm")
    expected = greedy_reference(model, PROMPTS, NEW_TOKENS)
    config = CHATGLM | {"architectures": [architecture]}
    folder = rewritten(save(model, tmp_path / "ckpt"), chatglm, **config)
    assert ours(folder) == expected
    assert in_transformers(as_cell(folder)) == expected


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rope_ratio": 50}, "rope_ratio"),
        ({"rmsnorm": False}, "rmsnorm"),
        ({"original_rope": False}, "original_rope"),
        ({"add_bias_linear": True}, "add_bias_linear"),
        ({"multi_query_attention": False}, "multi_query_attention"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual"),
        ({"kv_channels": None}, "kv_channels"),
        ({"pre_seq_len": 8}, "pre_seq_len"),
        ({"post_layer_norm": False}, "post_layer_norm"),
    ],
)
def test_other_chatglms_are_refused(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    """The first ChatGLM among them, whose config has no kv_channels."""
    folder = rewritten(save(random_model("glm"), tmp_path / "ckpt"), chatglm, **CHATGLM | change)
    with pytest.raises(UserError, match=f"config.json: {field}"):
        ours(folder)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    def broken(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = chatglm(tensors)
        del found["transformer.encoder.layers.1.self_attention.query_key_value.weight"]
        return found

    folder = rewritten(save(random_model("glm"), tmp_path / "ckpt"), broken, **CHATGLM)
    with pytest.raises(StoreError, match=r"lacks 3 of .*layers\.1\.self_attn"):
        ours(folder)


@pytest.mark.parametrize("name", ["gpt-neox", "gptj", "codegen"])
def test_checkpoints_from_before_transformers_5(name: str, tmp_path: Path) -> None:
    """Causal masks are stored like weights, and the head of GPT-NeoX is called embed_out."""

    def old(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {k.replace("lm_head", "embed_out") if "neox" in name else k: v for k, v in tensors.items()}
        prefix = {
            "gpt-neox": "gpt_neox.layers.0.attention",
            "gptj": "transformer.h.0.attn",
            "codegen": "transformer.h.0.attn",
        }[name]
        masks = {
            "bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
            "masked_bias": torch.tensor(-1e9),
            "rotary_emb.inv_freq": torch.ones(3),
        }
        return found | {f"{prefix}.{part}": mask for part, mask in masks.items()}

    model = random_model(name)
    folder = rewritten(save(model, tmp_path / "ckpt"), old)
    expected = greedy_reference(model, PROMPTS, NEW_TOKENS)
    assert ours(folder) == expected
    assert in_transformers(as_cell(folder)) == expected


@pytest.mark.parametrize(("given", "refused"), [((22, 4), True), ((25, 9), False), ((20, 5), False)])
def test_growing_past_longropes_original_length(given: tuple[int, int], refused: bool, tmp_path: Path) -> None:
    """transformers computes a Phi-3 anew when it grows past that length; what is longer from the start is rotated so
    all along."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 700.0,
        "short_factor": [1.0, 1.5, 2.0],
        "long_factor": [4.0, 5.0, 6.0],
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 24,
    }
    made = Phi3Config(
        hidden_size=60,
        num_attention_heads=5,
        num_hidden_layers=2,
        intermediate_size=90,
        vocab_size=VOCAB,
        rope_parameters=rope,
        original_max_position_embeddings=24,
        max_position_embeddings=64,
        pad_token_id=1,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    folder = save(Phi3ForCausalLM(made), tmp_path / "ckpt")
    prompt, params = random_prompts([given[0]])[0], SamplingParams(max_tokens=given[1], ignore_eos=True)
    with LLM(folder, cache_dir=tmp_path / "cache", dtype="float32") as llm:
        if refused:
            with pytest.raises(UserError, match="at most 24 positions in all, or a prompt longer"):
                llm.generate([prompt], params)
            return
        found = [list(o.token_ids) for o in llm.generate([prompt], params)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert found == greedy_reference(model.eval(), [prompt], given[1])
