"""What the files of a checkpoint hold decides: missing and unexpected tensors, shards, ties, and the dtype."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from flexgen_bench import LLM, SamplingParams
from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.checkpoints.source import open_source
from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.llm.model_source import checkpoint_of
from tests.support.quantized_factory import edit
from tests.support.shapes import no_progress
from tests.support.tiny_models import greedy_reference, random_model, random_prompts, save

PROMPTS = random_prompts([2, 13])
State = dict[str, Tensor]


def llama(folder: Path, name: str = "llama-multi-query") -> tuple[ModelShape, Path]:
    """A saved model, and its shape."""
    save(random_model(name), folder)
    with open_source(folder) as source:
        return source.shape, folder


def change(folder: Path, edit_state: Callable[[State], Any], **options: Any) -> None:
    state = load_file(folder / "model.safetensors")
    edit_state(state)
    save_file(state, folder / "model.safetensors", metadata=options or {"format": "pt"})


def ours(folder: Path, cache: Path) -> list[list[int]]:
    with LLM(folder, cache_dir=cache, dtype="float32") as llm:
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        return [list(o.token_ids) for o in llm.generate(PROMPTS, params)]


def theirs(folder: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return greedy_reference(model, PROMPTS, 5)


def as_cell(shape: ModelShape, folder: Path, cache: Path, dtype: DType = DType.FLOAT32) -> Path:
    spec = ModelSpec(shape, WeightSource.PATH, str(folder))
    return prepare_checkpoint(spec, dtype, cache, no_progress)


def refused(shape: ModelShape, folder: Path, cache: Path, message: str) -> None:
    """Both ways to a checkpoint refuse it, with the same words."""
    with pytest.raises(StoreError, match=message):
        ours(folder, cache)
    with pytest.raises(StoreError, match=message):
        as_cell(shape, folder, cache)


# Missing and unexpected tensors

LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{LAYER}.self_attn.q_norm.weight", torch.ones(12)),
        (f"{LAYER}.self_attn.q_proj.bias", torch.ones(60)),
        ("model.layers.3.input_layernorm.weight", torch.ones(60)),
        ("lm_head.bias", torch.ones(131)),
        (f"{LAYER}.self_attn.q_proj.lora_A.weight", torch.ones(4, 60)),
        ("embed_tokens.weight", torch.ones(131, 60)),
        (f"{LAYER}.block_sparse_moe.gate.weight", torch.ones(4, 60)),
    ],
)
def test_a_tensor_without_a_place_is_refused(name: str, tensor: Tensor, tmp_path: Path) -> None:
    """Norms of queries and biases that the config denies were dropped without a word."""
    shape, folder = llama(tmp_path / "ckpt")
    change(folder, lambda state: state.update({name: tensor}))
    refused(shape, folder, tmp_path / "cache", f"no place for: {name}")


def test_harmless_tensors_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Buffers that are computed, biases of zeros, and with a warning heads for other questions: the tokens are the same
    without."""
    shape, folder = llama(tmp_path / "ckpt")
    expected = theirs(folder)
    extra = {
        f"{LAYER}.self_attn.rotary_emb.inv_freq": torch.ones(6),
        "model.rotary_emb.inv_freq": torch.ones(6),
        f"{LAYER}.mlp.up_proj.bias": torch.zeros(90),
        "v_head.summary.weight": torch.ones(1, 60),
    }
    change(folder, lambda state: state.update(extra))
    with caplog.at_level(logging.WARNING, "flexgen_bench.stage"):
        assert ours(folder, tmp_path / "cache") == expected
    assert "v_head.summary.weight is not used to generate" in caplog.text
    as_cell(shape, folder, tmp_path / "cache")


def test_a_mixture_of_experts_under_the_name_is_refused(tmp_path: Path) -> None:
    _, folder = llama(tmp_path / "ckpt")
    edit(folder, num_local_experts=8)
    with pytest.raises(UserError, match="num_local_experts"):
        ours(folder, tmp_path / "cache")


def shards(folder: Path, suffix: str = "safetensors") -> tuple[State, dict[str, str]]:
    """The tensors of a folder spread over two files, and where each is; the index is not yet written."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {n: f"part-{i % 2}.{suffix}" for i, n in enumerate(sorted(state))}
    return state, where


def put(folder: Path, state: State, where: dict[str, str], index: dict[str, str]) -> None:
    stem = "model.safetensors"
    for file in set(where.values()):
        held = {n: state[n] for n in state if where[n] == file}
        if file.endswith(".bin"):
            stem = "pytorch_model.bin"
            torch.save(held, folder / file)
        else:
            save_file(held, folder / file, metadata={"format": "pt"})
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_count_and_not_what_the_index_says_of_them(suffix: str, tmp_path: Path) -> None:
    """As in transformers: an index that lacks a tensor, or has it in the wrong shard, takes nothing away."""
    shape, folder = llama(tmp_path / "ckpt")
    expected = theirs(folder)
    state, where = shards(folder, suffix)
    index = dict(where)
    del index["model.norm.weight"]
    index[f"{LAYER}.mlp.up_proj.weight"] = next(
        f for f in set(where.values()) if f != where[f"{LAYER}.mlp.up_proj.weight"]
    )
    put(folder, state, where, index)
    assert ours(folder, tmp_path / "cache") == expected
    put(folder, state | {"odd.weight": torch.ones(3)}, where | {"odd.weight": "part-0." + suffix}, index)
    refused(shape, folder, tmp_path / "cache", "no place for: odd.weight")


def test_an_index_that_promises_more_than_the_shards_hold(tmp_path: Path) -> None:
    shape, folder = llama(tmp_path / "ckpt")
    state, where = shards(folder)
    gone = f"{LAYER}.mlp.up_proj.weight"
    put(folder, {n: t for n, t in state.items() if n != gone}, where, where)
    refused(shape, folder, tmp_path / "cache", f"lists 1 tensors that no shard holds: {gone}")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    """The same twice is no matter; two different ones are."""
    shape, folder = llama(tmp_path / "ckpt")
    expected = theirs(folder)
    state, where = shards(folder)
    put(folder, state, where, where)
    other = folder / next(f for f in set(where.values()) if f != where["model.norm.weight"])
    held = load_file(other)
    save_file(held | {"model.norm.weight": state["model.norm.weight"]}, other)
    assert ours(folder, tmp_path / "cache") == expected
    save_file(held | {"model.norm.weight": state["model.norm.weight"] + 1}, other)
    refused(shape, folder, tmp_path / "cache", "model.norm.weight is in .* with different values")


def test_one_file_counts_before_shards_and_safetensors_before_pickles(tmp_path: Path) -> None:
    """As in transformers 5."""
    _, folder = llama(tmp_path / "ckpt")
    state = load_file(folder / "model.safetensors")
    worse = {n: t * 0.5 for n, t in state.items()}
    torch.save(worse, folder / "pytorch_model.bin")
    put(folder, worse, dict.fromkeys(worse, "part-0.safetensors"), dict.fromkeys(worse, "part-0.safetensors"))
    assert ours(folder, tmp_path / "cache") == theirs(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "truncated or not a safetensors file"), (b"\xff" * 64, "truncated or not a safetensors file")],
)
def test_a_shard_that_is_no_file(content: bytes, message: str, tmp_path: Path) -> None:
    shape, folder = llama(tmp_path / "ckpt")
    state, where = shards(folder)
    put(folder, state, where, where)
    (folder / "part-1.safetensors").write_bytes(content)
    refused(shape, folder, tmp_path / "cache", f"part-1.*{message}")


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    shape, folder = llama(tmp_path / "ckpt")
    (folder / "adapter_config.json").write_text("{}")
    refused(shape, folder, tmp_path / "cache", "adapter.*merge_and_unload")


# Embedding and head

_FAMILIES = {"llama": "llama-tied-grouped", "opt": "opt", "opt-projected": "opt-350m-like"}
_HEADS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "absent": lambda table: None,
    "equal": lambda table: table.clone(),
    "different": lambda table: torch.randn(table.shape, generator=torch.manual_seed(3)) * 0.3,
}


def _with_head(folder: Path, kind: str) -> None:
    state = load_file(folder / "model.safetensors")
    table = next(t for n, t in state.items() if n.endswith("embed_tokens.weight"))
    head = _HEADS[kind](table)
    if head is not None:
        state["lm_head.weight"] = head
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", _HEADS)
@pytest.mark.parametrize("name", _FAMILIES)
def test_the_stored_head_decides(name: str, head: str, tied: bool, tmp_path: Path) -> None:
    """With a tie in the config and another head in the file, the embedding was used; transformers 5 takes what is
    stored."""
    shape, folder = llama(tmp_path / "ckpt", _FAMILIES[name])
    _with_head(folder, head)
    edit(folder, tie_word_embeddings=tied)
    if head == "absent" and not tied:  # transformers makes up random numbers
        with pytest.raises(StoreError, match=r"lacks 1 of .*lm_head.weight.*tie_word_embeddings"):
            ours(folder, tmp_path / "cache")
        return
    expected = theirs(folder)
    assert ours(folder, tmp_path / "cache") == expected
    with open_source(folder) as source:
        found = source.shape
    assert found.tied_embeddings == (tied and head != "different")
    as_it_is = ModelShape(**{**to_json(shape), "tied_embeddings": found.tied_embeddings})
    assert theirs(as_cell(as_it_is, folder, tmp_path / "cache")) == expected
    other = ModelShape(**{**to_json(shape), "tied_embeddings": not found.tied_embeddings})
    with pytest.raises(StoreError, match=r"tied_embeddings is .* there"):
        as_cell(other, folder, tmp_path / "cache")


def test_a_head_alone_stands_for_the_embedding_too(tmp_path: Path) -> None:
    """Some tools store the other one of the two."""
    shape, folder = llama(tmp_path / "ckpt", "llama-tied-grouped")
    expected = theirs(folder)
    change(folder, lambda s: s.update({"lm_head.weight": s.pop("model.embed_tokens.weight")}))
    assert theirs(folder) == ours(folder, tmp_path / "cache") == expected
    assert theirs(as_cell(shape, folder, tmp_path / "cache")) == expected


def test_an_untied_head_takes_room_of_its_own(tmp_path: Path) -> None:
    """The plan of a model counts its head where the stored one is another one."""
    _, folder = llama(tmp_path / "ckpt", "llama-tied-grouped")
    sizes = []
    for head in ("absent", "different"):
        _with_head(folder, head)
        with LLM(folder, cache_dir=tmp_path / "cache", dtype="float32") as llm:
            sizes.append(llm._weights.packed.file_bytes)
    assert sizes[1] - sizes[0] >= 131 * 64 * 4


# The dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("said", [{}, {"torch_dtype": None}], ids=["no entry", "null"])
def test_without_an_entry_the_weights_own_dtype(dtype: torch.dtype, said: dict[str, Any], tmp_path: Path) -> None:
    """It was bfloat16, whatever they were."""
    _, folder = llama(tmp_path / "ckpt")
    change(folder, lambda s: s.update({n: t.to(dtype) for n, t in s.items()}))
    edit(folder, dtype=None)
    config = json.loads((folder / "config.json").read_text()) | said
    (folder / "config.json").write_text(json.dumps(config))
    auto = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype
    with open_source(folder) as source:
        spec = ModelSpec(source.shape, WeightSource.PATH, str(folder))
    for model in (folder, spec):
        _, found = checkpoint_of(model, None, tmp_path / "cache", no_progress)
        assert f"torch.{found}" == str(auto) == str(dtype)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "float32"),
        ({"torch_dtype": "float8_e4m3fn"}, "float32"),
    ],
)
def test_what_the_config_says_of_the_dtype(said: dict[str, Any], expected: str, tmp_path: Path) -> None:
    _, folder = llama(tmp_path / "ckpt")
    edit(folder, **({"dtype": None} | said))
    assert checkpoint_of(folder, None, tmp_path, no_progress)[1] == expected


def test_mixed_dtypes_as_transformers_sees_them(tmp_path: Path) -> None:
    """Norms in float32 beside matrices in bfloat16: the first tensor of the file counts, which is a matrix."""
    _, folder = llama(tmp_path / "ckpt")
    change(folder, lambda s: s.update({n: t.bfloat16() for n, t in s.items() if t.ndim > 1}))
    edit(folder, dtype=None)
    auto = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype
    assert f"torch.{checkpoint_of(folder, None, tmp_path, no_progress)[1]}" == str(auto)
    assert ours(folder, tmp_path / "cache") == theirs(folder)


def test_float64_is_read_and_never_chosen(tmp_path: Path) -> None:
    _, folder = llama(tmp_path / "ckpt")
    change(folder, lambda s: s.update({n: t.double() for n, t in s.items()}))
    edit(folder, dtype=None)
    assert ours(folder, tmp_path / "cache") == theirs(folder)
    with pytest.raises(UserError, match=r"float64.*give another one"):
        checkpoint_of(folder, None, tmp_path, no_progress)
