"""GGUF files of families that are not Llama's: the same tokens as the model they were made of, and the same tensors as
transformers reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from flexgen_bench import LLM, SamplingParams
from flexgen_bench.checkpoints.gguf.names import ARCHITECTURES
from flexgen_bench.checkpoints.gguf_shape import gguf_shape
from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.model import DType
from flexgen_bench.models.registry import shape_from_config
from tests.support.gguf_families import randomised, write_family
from tests.support.gguf_writing import byte_level
from tests.support.shapes import no_progress
from tests.support.tiny_models import greedy_reference

VOCABULARY = byte_level(["some text", "some more text"], size=300, padding_token_id=1)
SIZE = len(VOCABULARY.tokens)
PROMPTS = [[5, 6, 7], [9] * 30, [n % (SIZE - 3) + 3 for n in range(7, 7 * 41, 7)]]
BASE = {
    "vocab_size": SIZE,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
SHORT, LONG = [1.0, 1.5, 2.0, 2.5], [3.0, 5.0, 7.0, 9.0]


@dataclass(frozen=True)
class Family:
    """config: class and settings of transformers. keys, tensors: what the file states beside what the config does.
    theirs: whether transformers' own reader can read it."""

    architecture: str
    config: Any
    settings: Mapping[str, Any]
    keys: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Any] = field(default_factory=dict)
    theirs: bool = True

    def model(self) -> Any:
        return randomised(AutoModelForCausalLM.from_config(self.config(**self.settings)))


WINDOW = {"sliding_window": 7}
PHI3 = BASE | WINDOW | {"tie_word_embeddings": False}
GEMMA = BASE | {"head_dim": 16, "num_hidden_layers": 4, "query_pre_attn_scalar": 16} | WINDOW
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": SHORT[:4],
    "long_factor": LONG[:4],
    "partial_rotary_factor": 8 / 12,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2}
# Widths of experts are transformers' defaults, which its own reader takes whatever a file says.
FAMILIES = {
    "mistral": Family("llama", transformers.MistralConfig, BASE | WINDOW),
    "mixtral": Family(
        "llama",
        transformers.MixtralConfig,
        BASE | WINDOW | {"num_local_experts": 5, "head_dim": 12},
        {"rope.freq_base": 1_000_000.0},
        theirs=False,
    ),
    "qwen2-moe": Family("qwen2moe", transformers.Qwen2MoeConfig, BASE | EXPERTS),
    "qwen3-moe": Family(
        "qwen3moe", transformers.Qwen3MoeConfig, BASE | EXPERTS | {"norm_topk_prob": True, "head_dim": 16}
    ),
    "phi3": Family(
        "phi3", transformers.Phi3Config, PHI3 | {"rope_parameters": {"rope_theta": 700.0}}, {"rope.freq_base": 700.0}
    ),
    "phi3-longrope": Family(
        "phi3",
        transformers.Phi3Config,
        PHI3 | {"original_max_position_embeddings": 64, "rope_scaling": LONGROPE, "rope_theta": 10000.0},
        {"rope.dimension_count": 8, "rope.scaling.attn_factor": (1 + np.log(2) / np.log(64)) ** 0.5},
        {
            "rope_factors_long.weight": np.array(LONG, np.float32),
            "rope_factors_short.weight": np.array(SHORT, np.float32),
        },
        theirs=False,
    ),
    "gemma2": Family(
        "gemma2", transformers.Gemma2Config, GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 20.0}
    ),
    "gemma3": Family(
        "gemma3", transformers.Gemma3TextConfig, GEMMA | {"num_hidden_layers": 7}, {"rope.freq_base": 1_000_000.0}
    ),
    "gemma3-scaled": Family(
        "gemma3",
        transformers.Gemma3TextConfig,
        GEMMA
        | {
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        },
        {
            "rope.freq_base": 1_000_000.0,
            "rope.freq_base_swa": 500.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
            "attention.sliding_window_pattern": [True, False, True, False],
        },
        theirs=False,
    ),
    "bloom": Family(
        "bloom",
        transformers.BloomConfig,
        {"vocab_size": SIZE, "hidden_size": 48, "n_layer": 2, "n_head": 3, "bos_token_id": 2, "eos_token_id": 3},
        {"context_length": 2048, "feed_forward_length": 192},
    ),
}


def write(name: str, folder: Path, keys: Mapping[str, Any] | None = None) -> tuple[Path, Any]:
    family = FAMILIES[name]
    model = family.model()
    all_keys = {**family.keys, **(keys or {})}
    file = write_family(folder / "m.gguf", family.architecture, model, VOCABULARY, all_keys, family.tensors)
    return file, model


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    """From keys to the order of rows. Windows are left by the prompts, caps bind, factors are not 1."""
    file, model = write(name, tmp_path)
    with LLM(file, cache_dir=tmp_path, dtype="float32", gpu="cpu") as engine:
        outputs = engine.generate(PROMPTS, SamplingParams(max_tokens=10, ignore_eos=True))
    assert [list(output.token_ids) for output in outputs] == greedy_reference(model, PROMPTS, 10)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.theirs])
def test_tensors_are_those_that_transformers_reads(name: str, tmp_path: Path) -> None:
    """Bit for bit, also where the file has norms with one added."""
    file, _ = write(name, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    spec = ModelSpec(gguf_shape(file), WeightSource.PATH, str(file))
    folder = prepare_checkpoint(spec, DType.FLOAT32, tmp_path / "cache", no_progress)
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for key, value in ours.named_parameters():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_are_those_of_the_configs(name: str, tmp_path: Path) -> None:
    file, model = write(name, tmp_path)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    assert gguf_shape(file) == shape_from_config(config, "m")


def test_the_largest_gemmas_scale_by_their_hidden_size(tmp_path: Path) -> None:
    """Their files do not say so; llama.cpp knows them by their number of layers."""
    for name, layers in (("gemma2", 46), ("gemma3", 62)):
        family = FAMILIES[name]
        settings = dict(family.settings) | {"num_hidden_layers": layers, "hidden_size": 32, "intermediate_size": 8}
        model = AutoModelForCausalLM.from_config(family.config(**settings))
        file = write_family(tmp_path / f"{name}.gguf", name, model, VOCABULARY)
        assert gguf_shape(file).options["query_scalar"] == 8


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("phi3", {"rope.scaling.type": "yarn"}, "phi3.rope.scaling.type is 'yarn'; .* longrope"),
    ("phi3", {"rope.dimension_count": 7}, "rope.dimension_count is 7; .* even, and at most 12"),
    ("phi3", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping is 3.0"),
    ("gemma2", {"attention.scale": 0.5}, "attention.scale is 0.5; .*0.25"),
    ("gemma2", {"rope.dimension_count": 8}, "rope.dimension_count is 8; what can be read is 16"),
    ("gemma3", {"attention.sliding_window_pattern": [True, False]}, "sliding_window_pattern is .* each of the 7"),
    ("gemma3", {"attn_logit_softcapping": 3.0}, "gemma3.attn_logit_softcapping is 3.0"),
    ("bloom", {"rope.freq_base": 10000.0}, "bloom.rope.freq_base is 10000.0. What it does"),
    ("bloom", {"attention.max_alibi_bias": 4.0}, "max_alibi_bias is 4.0; what can be read is 8"),
    ("bloom", {"feed_forward_length": 96}, "feed_forward_length is 96; what can be read is 192"),
    ("bloom", {"attention.head_count_kv": 1}, "head_count_kv is 1; what can be read is 3"),
    ("mistral", {"expert_count": 8}, "does not state llama.expert_used_count"),
    ("qwen3-moe", {"expert_gating_func": 2}, "expert_gating_func is 2; 1 can be read"),
    ("qwen3-moe", {"expert_shared_count": 1}, "expert_shared_count is 1; 0 can be read"),
    ("qwen3-moe", {"attention.sliding_window": 9}, "sliding_window is 9; .* 0, or at least"),
    ("qwen2-moe", {"expert_feed_forward_length": None}, "does not state qwen2moe.expert_feed_forward_length"),
]


@pytest.mark.parametrize(("name", "keys", "message"), REFUSED)
def test_what_would_change_results_is_refused(name: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    file, _ = write(name, tmp_path, keys)
    with pytest.raises(StoreError, match=message):
        gguf_shape(file)


def test_one_list_of_factors_is_not_enough(tmp_path: Path) -> None:
    family = FAMILIES["phi3-longrope"]
    short = {"rope_factors_short.weight": family.tensors["rope_factors_short.weight"]}
    file = write_family(tmp_path / "m.gguf", "phi3", family.model(), VOCABULARY, family.keys, short)
    with pytest.raises(StoreError, match=r"has one of rope_factors_long.weight and rope_factors_short.weight"):
        gguf_shape(file)


def test_every_architecture_is_tested() -> None:
    """Llama, Qwen 2 and Qwen 3 in test_gguf_config.py."""
    assert ARCHITECTURES.keys() == {family.architecture for family in FAMILIES.values()} | {"llama", "qwen2", "qwen3"}
