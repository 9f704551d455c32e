"""What a GGUF file says about its model: computed as it says, or refused; never left out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from flexgen_bench import LLM, SamplingParams
from flexgen_bench.checkpoints.gguf.config import config_from_gguf
from flexgen_bench.checkpoints.gguf.header import read_header
from flexgen_bench.checkpoints.gguf_shape import gguf_shape
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.models.registry import shape_from_config
from tests.support.gguf_writing import byte_level, gguf_tensors, llama_keys, tiny_llama, write_gguf, write_llama

VOCABULARY = byte_level(["some text", "some more text"], size=300)
SIZE = len(VOCABULARY.tokens)
PROMPTS = [[5, 6, 7], [9] * 40, [n % (SIZE - 3) + 3 for n in range(7, 7 * 60, 7)]]


def llama3_factors(dim: int, theta: float, rope: dict[str, Any]) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter stores for llama 3.1's scaling: what each frequency is divided by."""
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    original, found = rope["original_max_position_embeddings"], []
    for exponent in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (exponent / dim)
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def expected_ids(model: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    made = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return made[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def check_tokens(file: Path, model: LlamaForCausalLM, cache: Path) -> None:
    with LLM(file, cache_dir=cache, dtype="float32", gpu="cpu") as engine:
        asked = SamplingParams(max_tokens=12, ignore_eos=True)
        outputs = engine.generate(PROMPTS, asked)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert list(output.token_ids) == expected_ids(model, prompt, 12)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
YARN_KEYS = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
ROPES: list[tuple[str, dict[str, Any] | None, dict[str, Any]]] = [
    ("base", {"rope_type": "default", "rope_theta": 500.0}, {}),
    ("no base means 10000", None, {"llama.rope.freq_base": None}),
    ("llama 3", LLAMA3, {}),
    ("linear", LINEAR, {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
    ("linear without type", LINEAR, {"llama.rope.scaling.factor": 4.0}),
    ("old key", LINEAR, {"llama.rope.scale_linear": 4.0}),
    ("none", None, {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}),
    ("a factor of one", None, {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 1.0}),
    ("yarn", YARN, YARN_KEYS),
    (
        "yarn with its own betas",
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
        YARN_KEYS
        | {
            "llama.rope.scaling.yarn_beta_fast": 16.0,
            "llama.rope.scaling.yarn_beta_slow": 2.0,
            "llama.rope.scaling.finetuned": True,
            "llama.rope.scaling.yarn_ext_factor": -1.0,
        },
    ),
]


@pytest.mark.parametrize(("rope", "keys"), [r[1:] for r in ROPES], ids=[r[0] for r in ROPES])
def test_positions(rope: dict[str, Any] | None, keys: dict[str, Any], tmp_path: Path) -> None:
    """Scaled positions were dropped: other tokens than those of transformers, without a word."""
    changes = {} if rope is None else {"rope_parameters": rope}
    model = tiny_llama(SIZE, **changes)
    tensors = gguf_tensors(model)
    if rope is LLAMA3:
        tensors["rope_freqs.weight"] = llama3_factors(8, 10000.0, LLAMA3)
    known = llama_keys(model.config) | VOCABULARY.all_keys() | keys
    file = write_gguf(tmp_path / "m.gguf", known, tensors)
    check_tokens(file, model, tmp_path)


def test_factors_of_frequencies_are_taken_as_stored(tmp_path: Path) -> None:
    """They need not be llama 3's, and a linear factor may come on top."""
    factors = [1.0, 1.5, 7.25, 3.0]
    model = tiny_llama(
        SIZE,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "attention_factor": 1.0,
            "factor": 1.0,
            "original_max_position_embeddings": 256,
            "short_factor": [2 * f for f in factors],
            "long_factor": [2 * f for f in factors],
        },
    )
    tensors = gguf_tensors(model) | {"rope_freqs.weight": np.array(factors, np.float32)}
    keys = llama_keys(model.config) | VOCABULARY.all_keys() | {"llama.rope.scaling.factor": 2.0}
    file = write_gguf(tmp_path / "m.gguf", keys, tensors)
    found = config_from_gguf(read_header(file))["rope_parameters"]
    assert found == model.config.rope_parameters
    ones = tensors | {"rope_freqs.weight": np.ones(4, np.float32)}
    plain = keys | {"llama.rope.scaling.factor": None}
    file = write_gguf(tmp_path / "ones.gguf", plain, ones)
    assert gguf_shape(file).options["rope_scaling"] is None
    check_tokens(tmp_path / "m.gguf", model, tmp_path)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ([1.0] * 3, r"rope_freqs.weight has shape \(3,\)"),
        ([1.0, 0.0, 1.0, 1.0], "not above 0"),
        ([1.0, math.nan, 1.0, 1.0], "not above 0"),
    ],
)
def test_factors_that_mean_nothing(factors: list[float], message: str, tmp_path: Path) -> None:
    model = tiny_llama(SIZE)
    tensors = gguf_tensors(model) | {"rope_freqs.weight": np.array(factors, np.float32)}
    keys = llama_keys(model.config) | VOCABULARY.all_keys()
    with pytest.raises(StoreError, match=message):
        gguf_shape(write_gguf(tmp_path / "m.gguf", keys, tensors))


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"head_dim": 16, "num_key_value_heads": 1},
        {"attention_bias": True, "mlp_bias": True},
        {"rms_norm_eps": 1e-6},
    ],
    ids=["tied", "wide heads", "biases", "eps"],
)
def test_other_forms(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_llama(SIZE, **changes)
    check_tokens(write_llama(tmp_path / "m.gguf", model, VOCABULARY), model, tmp_path)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "head_dim": 16}], ids=["", "tied"])
def test_other_architectures(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Biases, norms of heads, and rows of queries and keys that lie as in transformers."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        **{"head_dim": 8} | changes,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    check_tokens(write_llama(tmp_path / "m.gguf", model, VOCABULARY), model, tmp_path)


def test_a_small_file_says_little(tmp_path: Path) -> None:
    """Old converters left out what follows from the rest."""
    model = tiny_llama(SIZE, num_key_value_heads=4)
    left_out = dict.fromkeys(
        [
            "llama__attention__head_count_kv",
            "llama__attention__key_length",
            "llama__attention__value_length",
            "llama__vocab_size",
            "llama__rope__dimension_count",
        ]
    )
    file = write_llama(tmp_path / "m.gguf", model, VOCABULARY, **left_out)
    shape = gguf_shape(file)
    assert (shape.num_kv_heads, shape.head_dim, shape.vocab_size) == (4, 8, SIZE)


def test_the_shape_is_named_by_the_file(tmp_path: Path) -> None:
    model = tiny_llama(SIZE, rms_norm_eps=1e-5)
    file = write_llama(tmp_path / "some-name.gguf", model, VOCABULARY)
    theirs = json.loads(json.dumps(model.config.to_dict())) | {"architectures": ["LlamaForCausalLM"]}
    assert gguf_shape(file) == shape_from_config(theirs, "some-name")


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"general__architecture": "falcon"},
        "general.architecture is 'falcon'; 'llama', 'qwen2', 'qwen3', .* can be read",
    ),
    ({"llama__expert_count": 8}, "does not state llama.expert_used_count"),
    ({"llama__expert_shared_count": 1}, "expert_shared_count is 1; 0 can be read: a mixture of such experts"),
    ({"llama__expert_gating_func": 2}, "expert_gating_func is 2; 1 can be read"),
    ({"llama__attention__scale": 0.25}, "attention.scale is 0.25"),
    ({"llama__attention__clamp_kqv": 8.0}, "clamp_kqv is 8.0; 0.0 can be read"),
    ({"llama__attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ({"llama__final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"llama__logit_scale": 8.0}, "logit_scale is 8.0; 0.0 or 1.0"),
    ({"llama__attention__causal": False}, "attention.causal is False; True can be read"),
    ({"llama__rope__dimension_count": 4}, "rope.dimension_count is 4; what can be read is 8"),
    ({"llama__attention__value_length": 16}, "value_length is 16"),
    ({"llama__rope__scaling__type": "longrope"}, "rope.scaling.type is 'longrope'; .* none, linear, yarn"),
    (
        {
            "llama__rope__scaling__type": "yarn",
            "llama__rope__scaling__factor": 2.0,
            "llama__rope__scaling__yarn_attn_factor": 0.5,
        },
        "yarn_attn_factor is 0.5; what can be read is 1",
    ),
    ({"llama__rope__scaling__yarn_log_multiplier": 0.5}, "yarn_log_multiplier is 0.5. What it does"),
    ({"llama__a_new_idea": 3}, "llama.a_new_idea is 3. What it does to the model is not known here"),
    ({"llama__attention__head_count": [4, 2]}, r"head_count is \[4, 2\]; .* the same for all layers"),
    ({"llama__block_count": None}, "does not state llama.block_count"),
    ({"llama__block_count": 0}, "block_count is 0"),
    ({"llama__attention__layer_norm_rms_epsilon": None}, "does not state .*layer_norm_rms_epsilon"),
    ({"llama__rope__freq_base": "ten"}, "rope.freq_base is 'ten'; .* a number"),
    ({"llama__tensor_data_layout": "other"}, "tensor_data_layout is 'other'"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_what_would_change_results_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write_llama(tmp_path / "m.gguf", tiny_llama(SIZE), VOCABULARY, **changed)
    with pytest.raises(StoreError, match=message):
        gguf_shape(file)


@pytest.mark.parametrize(
    "changed",
    [
        {"llama__expert_count": 0, "llama__expert_used_count": 0},
        {"llama__attention__sliding_window": 256},
        {"llama__attention__scale": 8**-0.5},
        {"llama__attention__causal": True},
        {"llama__attention__head_count": [4, 4]},
        {"llama__tensor_data_layout": "Meta AI original pth"},
        {"tokenizer__ggml__an_extra": 1, "general__an_extra": 1},
    ],
)
def test_what_changes_nothing_is_not(changed: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_llama(SIZE)
    plain = write_llama(tmp_path / "plain.gguf", model, VOCABULARY)
    file = write_llama(tmp_path / "m.gguf", model, VOCABULARY, **changed)
    assert config_from_gguf(read_header(file)) == config_from_gguf(read_header(plain))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no.gguf does not exist"):
        gguf_shape(tmp_path / "no.gguf")
    with pytest.raises((StoreError, UserError), match=r"no.gguf"):
        LLM(tmp_path / "no.gguf", cache_dir=tmp_path)
