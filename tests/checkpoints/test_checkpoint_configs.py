"""Configs as people have them: what transformers runs runs here with the same tokens, and what it does not say is
refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN

from flexgen_bench import LLM, SamplingParams
from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.checkpoints.source import open_source
from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.folders import is_gguf
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Policy
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import to_full_length
from flexgen_bench.kernels import ops
from flexgen_bench.models.activations import ACTIVATIONS
from flexgen_bench.models.registry import family, shape_from_config
from tests.support.quantized_factory import edit
from tests.support.shapes import no_progress
from tests.support.tiny_models import HOST, VOCAB, greedy_reference, random_model, random_prompts, save

PROMPTS = random_prompts([2, 13])
BOM = b"\xef\xbb\xbf"


def llama(seed: int = 0, **changes: Any) -> Any:
    """Widths that are no multiples of 64, an odd vocabulary, and weights large enough that greedy tokens vary."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 60,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "intermediate_size": 90,
        "vocab_size": VOCAB,
        "max_position_embeddings": 24,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def ours(folder: Path, prompts: list[list[int]] = PROMPTS, new_tokens: int = 5) -> list[list[int]]:
    with LLM(folder, cache_dir=folder.parent / "cache", dtype="float32") as llm:
        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        return [list(o.token_ids) for o in llm.generate(prompts, params)]


def fresh(folder: Path, prompts: list[list[int]], new_tokens: int = 5) -> list[list[int]]:
    """Of transformers, loaded anew for each prompt: some kinds of rope remember the longest text that a model has
    seen."""
    found = []
    for prompt in prompts:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found += greedy_reference(model, [prompt], new_tokens)
    return found


def as_cell(folder: Path) -> Path:
    with open_source(folder) as source:
        spec = ModelSpec(source.shape, WeightSource.PATH, str(folder))
    return prepare_checkpoint(spec, DType.FLOAT32, folder.parent / "cache", no_progress)


# Names of the architecture


@pytest.mark.parametrize("name", ["llama-tied-grouped", "opt"])
@pytest.mark.parametrize(
    "architectures", [None, [], "bare", "case", "remove"], ids=["null", "empty", "bare", "case", "none"]
)
def test_other_names_of_an_architecture(name: str, architectures: Any, tmp_path: Path) -> None:
    """null, and the names LLaMAForCausalLM, OPTModel and LlamaModel, were refused."""
    model = random_model(name)
    folder = save(model, tmp_path / "ckpt")
    expected = greedy_reference(model, PROMPTS, 5)
    config = json.loads((folder / "config.json").read_text())
    usual = config.pop("architectures")[0]
    other = {
        "bare": [usual.replace("ForCausalLM", "Model")],
        "case": [usual.replace("lama", "LaMA").replace("OPT", "Opt")],
    }
    if architectures != "remove":
        config["architectures"] = other.get(architectures or "", architectures)  # type: ignore[arg-type]
    (folder / "config.json").write_text(json.dumps(config))
    assert ours(folder) == expected
    assert fresh(as_cell(folder), PROMPTS) == expected


@pytest.mark.parametrize(
    ("name", "part"), [("llama-tied-grouped", "model"), ("opt", "model"), ("opt", "model.decoder")]
)
def test_a_bare_decoder(name: str, part: str, tmp_path: Path) -> None:
    """As LlamaModel, OPTModel and OPT's decoder save themselves: without the first part of every name."""
    model = random_model(name)
    folder = save(model.get_submodule(part), tmp_path / "ckpt")
    config = json.loads((save(model, tmp_path / "whole") / "config.json").read_text())
    config["architectures"] = [type(model.model).__name__]
    (folder / "config.json").write_text(json.dumps(config))
    expected = greedy_reference(model, PROMPTS, 5)
    assert ours(folder) == expected
    assert fresh(as_cell(folder), PROMPTS) == expected


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "architectures"),
        ({"architectures": 5}, "architectures"),
        ({"model_type": "mistral"}, "model_type"),
        ({"architectures": None, "model_type": "gpt2"}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"num_local_experts": 4}, "num_local_experts"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"attention_bias": "no"}, "attention_bias"),
        ({"num_attention_heads": "5"}, "num_attention_heads"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_act": "softmax"}, "hidden_act"),
        ({"head_dim": 11}, "head_dim"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "full_attention"),
        ({"rope_scaling": {"type": "yarn", "factor": "2"}}, "factor of rope_type yarn"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 6}}, "short_factor"),
    ],
)
def test_what_would_change_results_is_refused(changes: dict[str, Any], field: str, tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "ckpt")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=f"config.json: {field}"):
        ours(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 5},
        {"head_dim": 16},
        {"attention_bias": True, "mlp_bias": True},
        {"pretraining_tp": 2},
        {"hidden_size": 65, "num_attention_heads": 5, "head_dim": 6},
        {"rms_norm_eps": 1e-3},
        {"sliding_window": 24},
        {"hidden_act": "relu2"},
        {"hidden_act": "quick_gelu"},
    ],
    ids=str,
)
def test_unusual_configs_give_the_tokens_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save(llama(**changes), tmp_path / "ckpt")
    if changes.get("num_key_value_heads") == 5:
        edit(folder, num_key_value_heads=None)
    assert ours(folder) == fresh(folder, PROMPTS)


def test_an_activation_has_the_names_that_transformers_gives_it() -> None:
    x = torch.linspace(-30, 30, 3001)
    for alias, name in ACTIVATIONS.items():
        assert torch.allclose(ops.activation(name, x), ACT2FN[alias](x), atol=2e-6), alias
    same = {
        alias
        for alias in ACT2FN
        if alias not in ("prelu", "xielu")
        and any(torch.allclose(ACT2FN[alias](x), ops.activation(n, x), atol=1e-5) for n in set(ACTIVATIONS.values()))
    }
    assert same == set(ACTIVATIONS), "all names of a function that is known are known"


def test_swish_runs(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "ckpt")
    expected = fresh(folder, PROMPTS)
    edit(folder, hidden_act="swish")
    assert ours(folder) == expected
    assert fresh(as_cell(folder), PROMPTS) == expected


def test_a_byte_order_mark(tmp_path: Path) -> None:
    """Some editors put one before JSON: in the config, the generation config and the index of shards."""
    folder = save(llama(), tmp_path / "ckpt", max_shard_size="40KB")
    expected = fresh(folder, PROMPTS)
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        file = folder / name
        file.write_bytes(BOM + file.read_bytes())
    assert ours(folder) == expected
    with LLM(folder, cache_dir=tmp_path / "cache") as llm:
        assert llm.tokenizer.end_ids == {2}
    made = as_cell(folder)
    assert fresh(made, PROMPTS) == expected
    assert not (made / "generation_config.json").read_bytes().startswith(BOM)


def test_a_gguf_file_is_one_in_any_case() -> None:
    assert is_gguf("m.GGUF")
    assert is_gguf(Path("a/m.Gguf"))
    assert not is_gguf("gguf")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(bad: float, tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "ckpt")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(state, folder / "model.safetensors", metadata={"format": "tf"})
    with pytest.raises(Exception, match=r"up_proj.*NaN or infinite"):
        ours(folder)


# Rotary positions

LONG = random_prompts([40, 12, 30, 3])  # of 24 positions before scaling
YARN = {"factor": 4.0, "original_max_position_embeddings": 24}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "dynamic-odd": {"rope_type": "dynamic", "factor": 2.7},
    "yarn": {"rope_type": "yarn"} | YARN,
    "yarn-own-ramp": {"rope_type": "yarn", "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False} | YARN,
    "yarn-temperature": {"rope_type": "yarn", "attention_factor": 1.3} | YARN,
    "yarn-mscale": {"rope_type": "yarn", "mscale": 1.2, "mscale_all_dim": 0.7} | YARN,
    "yarn-no-original": {"rope_type": "yarn", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 12,
    },
    "llama3-no-original": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "factor": 4.0,
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 4.0],
        "original_max_position_embeddings": 24,
    },
}


def _with_rope(folder: Path, rope: dict[str, Any], old: bool) -> None:
    """As ``rope_parameters``, or as older configs have it: ``rope_scaling`` with ``type``, and the base beside it."""
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    if old:
        names = {"rope_type": "type"}
        config["rope_scaling"] = {names.get(key, key): value for key, value in rope.items()}
        config["rope_theta"] = 5000.0
    else:
        config["rope_parameters"] = rope | {"rope_theta": 5000.0}
    long = rope["rope_type"] in ("llama3", "longrope")  # these state the positions after scaling
    config["max_position_embeddings"] = 96 if long else 24
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("old", [True, False], ids=["old", "new"])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_beyond_the_original_positions(rope: str, old: bool, tmp_path: Path) -> None:
    """yarn and dynamic were refused. The last prompts grow past the original length while they are continued."""
    folder = save(llama(), tmp_path / "ckpt")
    _with_rope(folder, ROPES[rope], old)
    expected = fresh(folder, LONG, 16)
    assert ours(folder, LONG, 16) == expected
    plain = save(llama(), tmp_path / "plain")
    assert fresh(plain, LONG, 16) != expected, "the scaling does something"
    assert fresh(as_cell(folder), LONG, 16) == expected


def test_the_old_entry_counts_where_both_are(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "ckpt")
    edit(folder, rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=700.0)
    assert ours(folder, LONG, 8) == fresh(folder, LONG, 8)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_a_long_prompt_is_rotated_by_its_whole_length(rope: str, chunk: int | None, tmp_path: Path) -> None:
    """Cut into chunks, beside prompts of other lengths, and sharing its beginning with one: every sequence as if it
    were alone."""
    folder = save(llama(), tmp_path / "ckpt")
    _with_rope(folder, ROPES[rope], old=False)
    begin = random_prompts([20], seed=3)[0]
    prompts = [begin + LONG[0][:25], begin + LONG[2][:3], begin + LONG[2][:3]]
    weights = PackedWeights.from_checkpoint(folder, DType.FLOAT32, tmp_path / "cache")
    policy = Policy(2, 2, prefill_chunk=chunk)
    engine = weights.engine(policy, Device.open(HOST, 1), tmp_path)
    sequences = to_full_length(prompts, SamplingParams(max_tokens=6))
    try:
        engine.generate(sequences)
    finally:
        engine.close()
    assert [s.new for s in sequences] == fresh(folder, prompts, 6)


def test_scores_beyond_the_original_length_are_refused_where_they_depend_on_it(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "ckpt")
    _with_rope(folder, ROPES["dynamic"], old=False)
    with LLM(folder, cache_dir=tmp_path / "cache", dtype="float32") as llm:
        assert len(llm.score([[5, 6]], [[7, 8]])) == 1
        with pytest.raises(UserError, match=r"at most 25 tokens.*rope_type dynamic"):
            llm.score([LONG[0]], [[7, 8]])


@pytest.mark.parametrize("rope", ROPES)
def test_a_shape_and_its_config_say_the_same(rope: str, tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "ckpt")
    _with_rope(folder, ROPES[rope], old=True)
    with open_source(folder) as source:
        shape = source.shape
    config = family("llama").config_from_shape(shape) | {"architectures": ["LlamaForCausalLM"]}
    assert shape_from_config(config, shape.name) == shape
