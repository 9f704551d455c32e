"""Quantized checkpoints are dequantized exactly, whichever way they are reached, or refused by the name of their
scheme."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from flexgen_bench import LLM, SamplingParams
from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.checkpoints.reader import Checkpoint
from flexgen_bench.checkpoints.source import open_source
from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.model import DType
from flexgen_bench.llm.model_source import checkpoint_of
from tests.support import quantized_factory as make
from tests.support.quantized_factory import edit, write
from tests.support.shapes import no_progress
from tests.support.tiny_models import greedy_reference, random_prompts, save

PROMPTS = random_prompts([3, 11])


def _groups(weights: dict[str, Any], targets: str = "Linear", **more: Any) -> dict[str, Any]:
    group = {"targets": [targets], "weights": weights, **more}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def _packed_config(bits: int, group: int) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "group_size": group, "strategy": "group"}
    return _groups(weights) | {"format": "pack-quantized"}


_GPTQ = {"quant_method": "gptq", "group_size": 16, "desc_act": False, "sym": False}
_INT8 = {"quant_method": "compressed-tensors", "format": "int-quantized"}
_STATIC = {"quant_method": "fp8", "activation_scheme": "static"}
# Of each scheme: how a matrix is quantized, and what config.json says. Heads of 24, widths of 72 and 136: blocks of 128
# end early.
SCHEMES: dict[str, tuple[Callable[[Tensor], make.Quantized], dict[str, Any]]] = {
    "int8": (make.int8_channels, _INT8),
    "int8-asymmetric": (make.int8_asymmetric, _INT8),
    "fp8-tensor": (make.fp8_tensor, _STATIC),
    "fp8-channels": (
        make.fp8_channels,
        _groups({"num_bits": 8, "type": "float", "strategy": "channel"}) | {"format": "float-quantized"},
    ),
    "fbgemm": (make.fp8_channels, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "modelopt": (make.fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "deepseek": (
        make.fp8_blocks((128, 128)),
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    ),
    "fp8-small-blocks": (make.fp8_blocks((32, 16)), {"quant_method": "fp8", "weight_block_size": [32, 16]}),
    "int4": (make.packed(4, 24), _packed_config(4, 24)),
    "int4-odd-groups": (make.packed(4, 40), _packed_config(4, 40)),
    "int4-ordered": (make.packed(4, 8, asymmetric=True, order=True), _packed_config(4, 8)),
    "bits-by-name": (
        lambda w: make.packed(8 if 136 in w.shape else 4, 8)(w),
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "all": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 8}},
                "mlp": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 8, "group_size": 8}},
            },
        },
    ),
    "int8-packed": (make.packed(8, 72), _packed_config(8, 72)),
    "gptq": (make.gptq(4, 16), _GPTQ | {"bits": 4}),
    "gptq-8": (make.gptq(8, 24), _GPTQ | {"bits": 8, "group_size": 24}),
    "gptq-one-group": (make.gptq(4, -1), _GPTQ | {"bits": 4, "group_size": -1}),
    "gptq-ordered": (make.gptq(4, 8, order=True), _GPTQ | {"bits": 4, "group_size": 8, "desc_act": True}),
    "gptq-v2": (make.gptq(4, 16, second=True), _GPTQ | {"bits": 4, "checkpoint_format": "gptq_v2"}),
    "awq": (make.awq(8), {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}),
}


def model(seed: int = 0, **changes: Any) -> Any:
    """A Llama of awkward widths with weights large enough that greedy tokens vary."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 136,
        "vocab_size": 131,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(model(), tmp_path / "ckpt")


def by_llm(folder: Path, cache: Path, **options: Any) -> list[list[int]]:
    with LLM(folder, cache_dir=cache, **options) as llm:
        params = SamplingParams(max_tokens=6, ignore_eos=True)
        return [list(o.token_ids) for o in llm.generate(PROMPTS, params)]


def by_cell(folder: Path, cache: Path, dtype: DType) -> Path:
    """What a cell with weights=path makes of it for every system."""
    with open_source(folder) as source:
        spec = ModelSpec(source.shape, WeightSource.PATH, str(folder))
    return prepare_checkpoint(spec, dtype, cache, no_progress)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_value_is_the_one_that_is_meant(scheme: str, folder: Path) -> None:
    quantize, config = SCHEMES[scheme]
    meant = write(folder, quantize, config)
    checkpoint = Checkpoint(folder)
    assert checkpoint.names() - {n for n in checkpoint.names() if n.endswith("bias")} == set(meant)
    for name, tensor in meant.items():
        found = checkpoint.tensor(name)
        assert checkpoint.header(name)[0] == tuple(found.shape)
        assert torch.equal(found.float(), tensor.float()), name


@pytest.mark.parametrize("scheme", ["int8", "deepseek", "int4-ordered", "gptq-ordered", "awq"])
def test_tokens_are_those_of_the_weights_that_are_meant(scheme: str, folder: Path, tmp_path: Path) -> None:
    """int8 weights were read as plain numbers in one way, fp8 ones in the other, their scales dropped in both."""
    reference = model()
    meant = write(folder, *SCHEMES[scheme])
    reference.load_state_dict(meant)
    expected = greedy_reference(reference, PROMPTS, 6)
    assert by_llm(folder, tmp_path / "cache", dtype="float32") == expected
    made = by_cell(folder, tmp_path / "cache", DType.FLOAT32)
    assert "quantization_config" not in json.loads((made / "config.json").read_text())
    plain, info = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert greedy_reference(plain, PROMPTS, 6) == expected
    assert "dequantized" in Checkpoint(made).note


def test_the_dtype_of_what_is_not_quantized_counts(folder: Path, tmp_path: Path) -> None:
    """Dequantized in float32, rounded once to the type of the embedding."""
    meant = write(folder, *SCHEMES["fp8-small-blocks"])
    state = load_file(folder / "model.safetensors")
    state |= {n: t.bfloat16() for n, t in state.items() if t.dtype is torch.float32 and "scale" not in n}
    save_file(state, folder / "model.safetensors")
    edit(folder, dtype=None)
    found, dtype = checkpoint_of(folder, None, tmp_path, no_progress, plain=True)
    assert dtype is DType.BFLOAT16
    stored = load_file(found / "model.safetensors")
    assert all(torch.equal(stored[name], meant[name].bfloat16()) for name in meant)


def test_transformers_agrees_about_fp8_blocks(folder: Path, tmp_path: Path) -> None:
    """It dequantizes them where there is no GPU, if blocks divide the matrix."""
    quantize, config = make.fp8_blocks((8, 8)), SCHEMES["fp8-small-blocks"][1]
    write(folder, quantize, config | {"weight_block_size": [8, 8]})
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = Checkpoint(folder)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.tensor(name).float(), tensor.float()), name
    assert by_llm(folder, tmp_path, dtype="float32") == greedy_reference(theirs, PROMPTS, 6)


def test_it_is_said_what_was_done(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(folder, *SCHEMES["fp8-tensor"])
    with LLM(folder, cache_dir=tmp_path, dtype="float32") as llm:
        assert llm.note.startswith("weights dequantized from fp8; the quantization of activations")
    assert "weights dequantized from fp8" in caplog.text


def test_the_config_is_part_of_what_a_store_is_known_by(folder: Path, tmp_path: Path) -> None:
    """The same files mean other weights under another config."""
    write(folder, *SCHEMES["gptq"])
    first = by_llm(folder, tmp_path, dtype="float32")
    edit(folder, quantization_config=SCHEMES["gptq"][1] | {"checkpoint_format": "gptq_v2"})
    second = by_llm(folder, tmp_path, dtype="float32")
    with open_source(folder) as source:
        reference = model()
        reference.load_state_dict({full: source.tensor(full.removeprefix("model.")) for full in reference.state_dict()})
    assert second == greedy_reference(reference, PROMPTS, 6) != first


@pytest.mark.parametrize(
    ("file", "scheme", "config"),
    [
        ("quantize_config.json", "gptq", _GPTQ | {"bits": 4}),
        ("quant_config.json", "awq", {"w_bit": 4, "q_group_size": 8, "zero_point": True, "version": "GEMM"}),
        ("hf_quant_config.json", "modelopt", {"quantization": {"quant_algo": "FP8"}}),
    ],
)
def test_a_config_of_its_own(folder: Path, file: str, scheme: str, config: dict[str, Any]) -> None:
    """Older tools do not write into config.json."""
    meant = write(folder, SCHEMES[scheme][0], None)
    with pytest.raises(StoreError, match="quantization"):
        open_source(folder)
    (folder / file).write_text(json.dumps(config))
    with open_source(folder) as source:
        name = "layers.1.mlp.down_proj.weight"
        assert torch.equal(source.tensor(name), meant[f"model.{name}"])


def _refused(folder: Path, tmp_path: Path, message: str) -> None:
    """In both ways, with the same words."""
    for attempt in (
        lambda: by_llm(folder, tmp_path / "cache", dtype="float32"),
        lambda: prepare_checkpoint(
            ModelSpec(_shape(tmp_path), WeightSource.PATH, str(folder)), DType.FLOAT32, tmp_path / "cache", no_progress
        ),
    ):
        with pytest.raises(StoreError, match=message):
            attempt()


def _shape(tmp_path: Path) -> Any:
    with open_source(save(model(), tmp_path / "plain")) as source:
        return source.shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantization by bitsandbytes"),
        ({"load_in_8bit": True}, "quantization by bitsandbytes"),
        ({"quant_method": "hqq"}, "quantization by hqq"),
        ({"quant_method": "aqlm"}, "quantization by aqlm"),
        ({"quant_method": "quanto"}, "quantization by quanto"),
        ({"quant_method": "torchao"}, "quantization by torchao"),
        ({"bits": 4}, "quantization by unknown"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantization by modelopt NVFP4"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 8}, "GPTQ quantization with 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 8, "checkpoint_format": "marlin"}, "GPTQ .*marlin"),
        ({"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemv"}, "AWQ .*gemv"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "compressed-tensors .*marlin-24"),
        (_INT8 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "compressed-tensors .*sparse-24"),
        (_INT8 | {"transform_config": {"config_groups": {"u": {}}}}, "compressed-tensors .*transform_config"),
        (_INT8, "no tensor is quantized like this"),
        (_GPTQ | {"bits": 4}, "no tensor is quantized like this"),
    ],
)
def test_other_schemes_are_refused_by_name(folder: Path, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    edit(folder, quantization_config=config)
    _refused(folder, tmp_path, message)


_MATRIX = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"weight": torch.ones(72, 136, dtype=torch.int8), "SCB": torch.ones(72)}, "SCB.*bitsandbytes"),
        ({"weight": torch.ones(72, 136, dtype=torch.int8)}, "down_proj.weight.*quantization_config"),
        ({"weight": torch.ones(72, 136).to(torch.float8_e5m2)}, "float8_e5m2.*quantization_config"),
        ({"weight": torch.ones(9792, 1, dtype=torch.uint8), "weight.absmax": torch.ones(2)}, "absmax.*bitsandbytes"),
        ({"W_q": torch.ones(72, 68, dtype=torch.uint8), "meta": torch.ones(1)}, "W_q.*HQQ"),
        (
            {"weight": torch.ones(72, 17, dtype=torch.int32), "scales": torch.ones(72, 2), "biases": torch.ones(72, 2)},
            "scales.*MLX",
        ),
        ({"weight": torch.ones(72, 136), "weight_scale": torch.ones(72, 1)}, "weight_scale.*quantization"),
    ],
)
def test_tensors_that_nothing_explains_are_refused(
    folder: Path, tmp_path: Path, parts: dict[str, Tensor], message: str
) -> None:
    state = load_file(folder / "model.safetensors")
    del state[f"{_MATRIX}.weight"]
    state |= {f"{_MATRIX}.{role}": part for role, part in parts.items()}
    save_file(state, folder / "model.safetensors")
    _refused(folder, tmp_path, message)


def _drop(state: dict[str, Tensor], role: str) -> None:
    del state[f"{_MATRIX}.{role}"]


def _cut(state: dict[str, Tensor], role: str) -> None:
    state[f"{_MATRIX}.{role}"] = state[f"{_MATRIX}.{role}"][:-1].clone()


def _float(state: dict[str, Tensor], role: str) -> None:
    state[f"{_MATRIX}.{role}"] = state[f"{_MATRIX}.{role}"].float()


@pytest.mark.parametrize(
    ("scheme", "damage", "role", "message"),
    [
        ("int8", _drop, "weight_scale", "weight_scale.*missing"),
        ("int8", _cut, "weight_scale", r"scales \(71, 1\)"),
        ("deepseek", _cut, "weight_scale_inv", r"(missing|scales \(0, 2\))"),
        ("fp8-tensor", _float, "weight", "it has a scale, but is torch.float32"),
        ("gptq", _drop, "qzeros", "qzeros.*missing"),
        ("gptq", _cut, "scales", "zero points"),
        ("gptq-ordered", _drop, "g_idx", "g_idx.*missing"),
        ("awq", _cut, "scales", "zero points"),
        ("int4", _drop, "weight_scale", "missing"),
        ("int4", _cut, "weight_packed", "words"),
        ("int4-ordered", _cut, "weight_zero_point", "zero points"),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_named(
    folder: Path, tmp_path: Path, scheme: str, damage: Any, role: str, message: str
) -> None:
    write(folder, *SCHEMES[scheme])
    state = load_file(folder / "model.safetensors")
    damage(state, role)
    save_file(state, folder / "model.safetensors")
    _refused(folder, tmp_path, f"(?s){_MATRIX}.*{message}|{message}")


def test_values_beyond_float16_are_refused(folder: Path, tmp_path: Path) -> None:
    """They became infinite."""
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][5] = 70000.0
    save_file(state, folder / "model.safetensors")
    with pytest.raises(StoreError, match="largest of float16"):
        by_llm(folder, tmp_path, dtype="float16")
    with pytest.raises(StoreError, match="largest of float16"):
        by_cell(folder, tmp_path, DType.FLOAT16)
