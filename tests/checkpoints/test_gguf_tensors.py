"""GGUF files tensor by tensor: values bit for bit, and what happens where the file is not what the model needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from flexgen_bench.checkpoints.gguf import tensors
from flexgen_bench.checkpoints.gguf.header import parts_of, read_header
from flexgen_bench.checkpoints.gguf_shape import gguf_shape
from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.model import DType
from tests.support.gguf_writing import Vocabulary, byte_level, gguf_tensors, llama_keys, tiny_llama, write_gguf
from tests.support.shapes import no_progress

VOCABULARY = byte_level(["some text", "some more text"], size=300)
# Stored in blocks, whose bytes are chosen at random here: the package can dequantize more than it can quantize.
BLOCKS = [
    Kind.Q4_0,
    Kind.Q4_1,
    Kind.Q5_0,
    Kind.Q5_1,
    Kind.Q8_0,
    Kind.Q2_K,
    Kind.Q3_K,
    Kind.Q4_K,
    Kind.Q5_K,
    Kind.Q6_K,
    Kind.IQ4_NL,
    Kind.IQ4_XS,
    Kind.IQ3_S,
    Kind.IQ2_XXS,
    Kind.BF16,
]


def model(**changes: Any) -> LlamaForCausalLM:
    return tiny_llama(len(VOCABULARY.tokens), **changes)


def write(path: Path, made: LlamaForCausalLM, vocabulary: Vocabulary = VOCABULARY) -> Path:
    keys = llama_keys(made.config) | vocabulary.all_keys()
    return write_gguf(path, keys, gguf_tensors(made))


def converted(file: Path, dtype: DType, cache: Path) -> dict[str, torch.Tensor]:
    spec = ModelSpec(gguf_shape(file), WeightSource.PATH, str(file))
    folder = prepare_checkpoint(spec, dtype, cache, no_progress)
    return {n: t for part in folder.glob("*.safetensors") for n, t in load_file(part).items()}


def bits(tensor: torch.Tensor) -> list[int]:
    """Random scales can be NaN, which is not equal to itself."""
    return tensor.contiguous().view(torch.uint8).flatten().tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 1},
        {"head_dim": 16},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=["plain", "tied", "wide heads", "biases"],
)
def test_the_weights_come_back(changes: dict[str, Any], dtype: DType, tmp_path: Path) -> None:
    """In the names and the order of rows of transformers, biases included."""
    made = model(**changes)
    found = converted(write(tmp_path / "m.gguf", made), dtype, tmp_path / "cache")
    expected = dict(made.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].to(getattr(torch, dtype.value))), name


@pytest.mark.parametrize("kind", [*BLOCKS, Kind.F16], ids=lambda kind: kind.name)
def test_quantized_values_are_those_of_transformers(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and not changed by reading a few rows at a time."""
    made = model(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    stored, chance = gguf_tensors(made), np.random.default_rng(0)
    kinds = {name: kind for name, values in stored.items() if values.ndim == 2}
    for name in kinds:
        rows, width = stored[name].shape
        block, size = gguf.GGML_QUANT_SIZES[kind]
        row = width // block * size
        stored[name] = chance.integers(0, 256, (rows, row), dtype=np.uint8)
        if kind is Kind.F16:
            stored[name] = chance.standard_normal((rows, width)).astype(np.float16)
    keys = llama_keys(made.config) | VOCABULARY.all_keys()
    file = write_gguf(tmp_path / "m.gguf", keys, stored, {} if kind is Kind.F16 else kinds)
    with np.errstate(all="ignore"):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    monkeypatch.setattr(tensors, "_PIECE_BYTES", 7 * 4 * 256)
    found = converted(file, DType.FLOAT32, tmp_path / "cache")
    for name, expected in theirs.named_parameters():
        assert bits(found[name]) == bits(expected.detach()), name


def test_other_systems_read_what_was_written(tmp_path: Path) -> None:
    """Answers of transformers on the written folder are those of the model that the file was made of."""
    made = model(tie_word_embeddings=True)
    spec_file = write(tmp_path / "m.gguf", made)
    spec = ModelSpec(gguf_shape(spec_file), WeightSource.PATH, str(spec_file))
    folder = prepare_checkpoint(spec, DType.FLOAT32, tmp_path, no_progress)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(4, 40)[None]
    assert torch.equal(loaded(ids).logits, made(ids).logits)
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)


# Files that are not what the model needs

Change = Callable[[dict[str, np.ndarray[Any, Any]]], None]
CHANGES: list[tuple[Change, str]] = [
    (lambda t: t.pop("blk.1.ffn_down.weight"), r"lacks 1 of 21 tensors: blk.1.ffn_down.weight\."),
    (lambda t: t.pop("output_norm.weight"), "lacks 1 of 21 tensors: output_norm.weight"),
    (
        lambda t: [t.pop(n) for n in list(t) if n.startswith("blk.1.")],
        r"lacks 9 of 21 tensors: blk.1.attn_q.weight, .*, \.\.\.",
    ),
    (
        lambda t: t.update({"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}),
        "holds 1 tensors that a llama model does not have: blk.0.attn_q_norm.weight",
    ),
    (lambda t: t.update({"blk.2.ffn_up.weight": np.ones((8, 8), np.float32)}), "blk.2.ffn_up.weight"),
    (lambda t: t.update({"blk.0.attn_q.scale": np.ones(1, np.float32)}), "blk.0.attn_q.scale"),
    (lambda t: t.update({"blk.0.attn_q.bias": np.ones(32, np.float32)}), "lacks 7 of 29 tensors: blk.0.attn_k.bias"),
    (
        lambda t: t.update({"blk.0.ffn_up.weight": np.ones((64, 31), np.float32)}),
        r"tensor blk.0.ffn_up.weight has shape \(64, 31\), the model needs \(64, 32\)",
    ),
    (lambda t: t.update({"token_embd.weight": np.ones((7, 32), np.float32)}), r"token_embd.weight has shape \(7, 32\)"),
    (lambda t: t.update({"blk.0.attn_norm.weight": np.ones(32, np.float64)}), "stored as F64"),
    (lambda t: t.update({"blk.0.attn_norm.weight": np.ones(32, np.int8)}), "stored as I8"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_other_tensors_than_those_of_the_model(change: Change, message: str, tmp_path: Path) -> None:
    """A missing tensor was once replaced by random numbers, others in every run, and the run was "ok"."""
    made = model()
    stored = gguf_tensors(made)
    change(stored)
    keys = llama_keys(made.config) | VOCABULARY.all_keys()
    file = write_gguf(tmp_path / "m.gguf", keys, stored)
    with pytest.raises(StoreError, match=message):
        converted(file, DType.FLOAT32, tmp_path / "cache")


def test_a_head_beside_a_tied_embedding_decides(tmp_path: Path) -> None:
    """Whether the head is the embedding follows from the file's own tensors."""
    assert not gguf_shape(write(tmp_path / "a.gguf", model())).tied_embeddings
    assert gguf_shape(write(tmp_path / "b.gguf", model(tie_word_embeddings=True))).tied_embeddings


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 30, 1000, 0.5, -1])
def test_truncated_files(keep: float, tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", model())
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(StoreError, match=r"m.gguf"):
        converted(file, DType.FLOAT32, tmp_path / "cache")


def test_damaged_headers(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", model())
    whole = file.read_bytes()
    for place, new, message in (
        (0, b"GGML", "not a GGUF file"),
        (4, b"\1\0\0\0", "version 1 "),
        (4, b"\0\0\0\3", "other byte order"),
        (8, b"\xff" * 8, "ends inside its header"),
        (16, b"\xff" * 8, "damaged"),
        (whole.index(b"blk.0.attn_k.weight"), b"blk.0.attn_q.weight", "tensor blk.0.attn_q.weight is there twice"),
        (whole.index(b"llama.block_count"), b"llama.vocab_size\0", "damaged|does not state|not known"),
    ):
        file.write_bytes(whole[:place] + new + whole[place + len(new) :])
        with pytest.raises(StoreError, match=message):
            converted(file, DType.FLOAT32, tmp_path / "cache")


def test_values_too_large_for_float16(tmp_path: Path) -> None:
    made = model()
    with torch.no_grad():
        made.model.norm.weight[3] = 1e5
    file = write(tmp_path / "m.gguf", made)
    with pytest.raises(StoreError, match=r"output_norm.weight holds values beyond.*dtype=bfloat16"):
        converted(file, DType.FLOAT16, tmp_path / "cache")


# A model in several files


def split(folder: Path, made: LlamaForCausalLM, **wrong: Any) -> list[Path]:
    stored = list(gguf_tensors(made).items())
    files = parts_of(folder / "m-00001-of-00003.gguf")
    for number, file in enumerate(files):
        keys = {"split.no": number, "split.count": 3, "split.tensors.count": len(stored)} | wrong
        if number == 0:
            keys |= llama_keys(made.config) | VOCABULARY.all_keys()
        write_gguf(file, keys, dict(stored[number::3]))
    return files


def test_a_split_model(tmp_path: Path) -> None:
    made = model()
    first, second, _ = split(tmp_path, made)
    found = converted(first, DType.FLOAT32, tmp_path / "cache")
    assert all(torch.equal(found[name], value) for name, value in made.named_parameters())
    with pytest.raises(StoreError, match=r"not the first part.*m-00001-of-00003.gguf"):
        read_header(second)
    second.rename(tmp_path / "gone.gguf")
    with pytest.raises(StoreError, match=r"m-00002-of-00003.gguf does not exist"):
        read_header(first)
    first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(StoreError, match="part of a model in 3 files, which its name does not say"):
        read_header(tmp_path / "renamed.gguf")


def test_a_split_model_with_a_wrong_part(tmp_path: Path) -> None:
    first, *_ = split(tmp_path, model(), **{"split.tensors.count": 22})
    with pytest.raises(StoreError, match="hold 21 tensors, not 22"):
        read_header(first)
    files = split(tmp_path, model())
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(StoreError, match=r"m-00002-of-00003.gguf is not part 2"):
        read_header(files[0])


def test_endings_in_capitals(tmp_path: Path) -> None:
    files = [file.rename(file.with_suffix(".GGUF")) for file in split(tmp_path, model())]
    assert len(read_header(files[0]).tensors) == 21
