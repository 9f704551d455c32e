"""Quantizing to GGUF's formats: the same bytes as ggml's own functions, the types that llama.cpp chooses, and the
checkpoint that is left."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from flexgen_bench.checkpoints.gguf.file_types import BLOCK_TYPES, FileType, Model, tensor_types
from flexgen_bench.checkpoints.gguf.rounding import check_format, packed, round_trip, rounded_checkpoint
from flexgen_bench.checkpoints.source import open_source
from flexgen_bench.core.errors import CannotRun, UserError
from flexgen_bench.core.microscaling import MXFP4
from flexgen_bench.core.model import DType
from flexgen_bench.core.progress import quiet
from tests.support.ggml import quantized
from tests.support.tiny_models import save
from tests.support.tiny_text_models import text_model

SUPER = ("Q4_K", "Q5_K", "Q6_K")
QUANTIZED = tuple(name for name in BLOCK_TYPES if name not in ("F32", "F16"))


def rows(count: int = 400, columns: int = 512) -> Any:
    """Of very different sizes, and what is unusual: nothing but zeros, one value, one sign, outliers, zero groups."""
    rng = np.random.default_rng(0)
    values = (rng.normal(size=(count, columns)) * rng.lognormal(size=(count, 1))).astype(np.float32)
    values[0] = 0
    values[1], values[2] = 3.0, -2.0
    values[3, :32], values[4, 16:32] = 0, 0
    values[5, 100] = 1e4
    values[6], values[7] = np.abs(values[6]), -np.abs(values[7])
    values[8] *= 1e-8
    return values


@pytest.mark.parametrize("name", QUANTIZED)
def test_values_are_those_of_ggml(name: str) -> None:
    kind, values = BLOCK_TYPES[name], rows()
    mine, theirs = packed(values, kind), quantized(values, name, kind.row_bytes(512))
    read = [dequantize(x, GGMLQuantizationType[name]) for x in (mine, theirs)]
    np.testing.assert_array_equal(*read)
    np.testing.assert_array_equal(round_trip(values, kind), read[0])
    # Codes of a group whose scale is 0 mean nothing; ours are 0 there, ggml leaves what its search has tried.
    np.testing.assert_array_equal(mine[9:], theirs[9:])


@pytest.mark.parametrize("name", SUPER)
def test_what_is_left_is_near(name: str) -> None:
    """Without ggml beside: the error of normally distributed values, and none of zeros."""
    values = rows()[9:]
    error = np.linalg.norm(round_trip(values, BLOCK_TYPES[name]) - values) / np.linalg.norm(values)
    low, high = {"Q4_K": (0.05, 0.08), "Q5_K": (0.025, 0.04), "Q6_K": (0.012, 0.025)}[name]
    assert low < error < high
    assert not round_trip(np.zeros((2, 256), np.float32), BLOCK_TYPES[name]).any()


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_sizes_are_those_of_the_format(name: str) -> None:
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    assert (BLOCK_TYPES[name].values, BLOCK_TYPES[name].bytes) == (values, size)
    assert packed(np.ones((3, 512), np.float32), BLOCK_TYPES[name]).shape == (3, BLOCK_TYPES[name].row_bytes(512))


def test_mxfp4_is_that_of_the_engine() -> None:
    assert BLOCK_TYPES["MXFP4"].row_bytes(256) == MXFP4.row_bytes(256)


def llama(layers: int, hidden: int, ffn: int, *, tied: bool, experts: int = 0) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (1000, hidden), "output_norm.weight": (hidden,)}
    if not tied:
        tensors["output.weight"] = (1000, hidden)
    stack = (experts,) if experts else ()
    ending = "_exps" if experts else ""
    for i in range(layers):
        tensors |= {f"blk.{i}.attn_{part}.weight": (hidden, hidden) for part in ("q", "k", "v", "output")}
        tensors |= {f"blk.{i}.ffn_{part}{ending}.weight": (*stack, ffn, hidden) for part in ("gate", "up")}
        tensors |= {f"blk.{i}.ffn_down{ending}.weight": (*stack, hidden, ffn), f"blk.{i}.attn_norm.weight": (hidden,)}
        tensors |= {f"blk.{i}.attn_q.bias": (hidden,)}
        if experts:
            tensors[f"blk.{i}.ffn_gate_inp.weight"] = (experts, hidden)
    return tensors


def counts(file_type: FileType, model: Model, tensors: dict[str, tuple[int, ...]]) -> dict[str, int]:
    types = tensor_types(file_type, model, tensors)
    return dict(Counter(kind.name for name, kind in types.items() if len(tensors[name]) > 1))


def test_the_mixture_of_a_published_seven_billion_model() -> None:
    """Llama-2-7B's Q4_K_M file has 193 tensors of Q4_K and 33 of Q6_K: head, and half of the values and of ffn_down."""
    tensors = llama(32, 4096, 11008, tied=False)
    assert counts(FileType.Q4_K_M, Model(32, False, 0), tensors) == {"Q4_K": 193, "Q6_K": 33}
    types = tensor_types(FileType.Q4_K_M, Model(32, False, 0), tensors)
    assert types["output.weight"].name == "Q6_K"
    more = [i for i in range(32) if types[f"blk.{i}.ffn_down.weight"].name == "Q6_K"]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert {types[name].name for name in ("output_norm.weight", "blk.0.attn_q.bias")} == {"F32"}


def test_rows_that_are_no_whole_super_blocks() -> None:
    """SmolLM2-135M is 576 wide: Q5_0 in place of Q4_K, Q8_0 in place of Q6_K, but for ffn_down, 1536 wide."""
    tensors = llama(30, 576, 1536, tied=True)
    found = counts(FileType.Q4_K_M, Model(30, True, 0), tensors)
    assert found == {"Q5_0": 30 * 6 - 14, "Q8_0": 1 + 14, "Q4_K": 16, "Q6_K": 14}
    assert counts(FileType.Q4_0, Model(30, True, 0), tensors) == {"Q4_0": 210, "Q8_0": 1}


def test_experts_and_the_largest() -> None:
    mixtral = tensor_types(FileType.Q4_K_M, Model(32, True, 8), llama(32, 512, 512, tied=False, experts=8))
    assert mixtral["blk.5.attn_k.weight"].name == mixtral["blk.5.attn_v.weight"].name == "Q8_0"
    assert mixtral["blk.5.attn_output.weight"].name == "Q5_K"
    assert mixtral["blk.5.ffn_gate_inp.weight"].name == "F32"
    largest = tensor_types(FileType.Q4_K_M, Model(80, True, 0), llama(80, 512, 512, tied=False))
    assert largest["blk.10.attn_v.weight"].name == "Q5_K"
    assert largest["blk.12.attn_v.weight"].name == "Q6_K"


def test_mxfp4_keeps_eight_bits_for_the_vocabulary() -> None:
    tensors = llama(2, 64, 64, tied=False)
    found = tensor_types(FileType.MXFP4, Model(2, False, 0), tensors)
    assert found["token_embd.weight"].name == found["output.weight"].name == "Q8_0"
    assert found["blk.1.ffn_up.weight"].name == "MXFP4"


@pytest.mark.parametrize("file_type", [FileType.Q4_0, FileType.Q8_0, FileType.MXFP4])
def test_rows_that_cannot_be_cut_are_refused(file_type: FileType) -> None:
    with pytest.raises(UserError, match=r"columns of blk\.0\.attn_q\.weight = 40"):
        tensor_types(file_type, Model(1, False, 0), {"blk.0.attn_q.weight": (40, 40)})


def test_the_checkpoint_that_is_left(tmp_path: Path) -> None:
    """Every matrix is that of a file of the format, norms are as they were, bytes are the file's, and a second call
    finds it."""
    folder = text_model(tmp_path / "tiny", "llama")
    made = rounded_checkpoint(folder, FileType.Q4_0, DType.FLOAT32, tmp_path / "made", quiet)
    with open_source(folder) as before, open_source(made.folder) as after:
        weight = before.checkpoint.tensor("model.layers.1.mlp.down_proj.weight").float()
        left = after.checkpoint.tensor("model.layers.1.mlp.down_proj.weight")
        np.testing.assert_array_equal(left.numpy(), round_trip(weight.numpy(), BLOCK_TYPES["Q4_0"]))
        norm = "model.layers.1.input_layernorm.weight"
        assert torch.equal(before.checkpoint.tensor(norm).float(), after.checkpoint.tensor(norm))
    (down,) = [t for t in made.tensors if t.name == "blk.1.ffn_down.weight"]
    assert (down.type, down.values, down.bytes) == ("Q4_0", 128 * 192, 128 * 192 // 32 * 18)
    assert down.error == pytest.approx(float((left - weight).norm() / weight.norm()), rel=1e-5)
    assert {t.error for t in made.tensors if t.type == "F32"} == {0.0}
    assert (made.folder / "tokenizer.json").is_file()
    assert rounded_checkpoint(folder, FileType.Q4_0, DType.FLOAT32, tmp_path / "made", quiet) == made
    assert json.loads((made.folder / "config.json").read_text())["dtype"] == "float32"


def test_a_family_without_such_files_is_refused(tmp_path: Path) -> None:
    folder = text_model(tmp_path / "tiny-opt", "opt")
    with pytest.raises(UserError, match="a GGUF format, of a opt model"):
        rounded_checkpoint(folder, FileType.Q8_0, DType.FLOAT32, tmp_path / "made", quiet)
    assert not (tmp_path / "made").exists()


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = text_model(tmp_path / "tiny", "llama")
    check_format(folder, FileType.Q4_0, DType.FLOAT32)
    monkeypatch.setattr("flexgen_bench.checkpoints.gguf.rounding.find_spec", lambda name: None)
    with pytest.raises(CannotRun, match=r"pip install 'flexgen-bench\[gguf\]'"):
        check_format(folder, FileType.Q4_0, DType.FLOAT32)


def test_experts_are_quantized_one_by_one(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_local_experts": 3}
    config = MixtralConfig(vocab_size=40, num_attention_heads=2, num_key_value_heads=2, **sizes)
    save(MixtralForCausalLM(config), tmp_path / "mixtral")
    made = rounded_checkpoint(tmp_path / "mixtral", FileType.Q8_0, DType.FLOAT32, tmp_path / "made", quiet)
    experts = [t for t in made.tensors if t.name == "blk.0.ffn_up_exps.weight"]
    assert len(experts) == 3
    assert all(0 < t.error < 0.01 for t in experts)
