"""Checkpoints of mixtures of experts in either spelling, what is wrong with them by name, and how they are packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_family_configs import ours
from test_family_names import NEW_TOKENS, PROMPTS, as_cell, in_transformers, rewritten
from torch import Tensor

from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.checkpoints.source import open_source
from flexgen_bench.config.build import model_spec
from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.errors import NotFinite, StoreError
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import PAGE
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import to_full_length
from flexgen_bench.kernels.quantization import fake_quantize
from flexgen_bench.models.model import Model
from flexgen_bench.models.packing import PackedUnit
from tests.support.shapes import no_progress
from tests.support.tiny_models import EMULATED, HOST, greedy_reference, random_model, save

NAMES = ["mixtral", "qwen3-moe", "qwen2-moe", "glm4-moe"]
FOUR = Compression(4, 16)


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(request.param)


def stacked(made: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """All experts of a layer in one tensor, as transformers 5 has them in memory and saves them on request."""
    return lambda _: {k: v.clone() for k, v in made.state_dict().items()}


def test_experts_in_one_tensor(model: Any, tmp_path: Path) -> None:
    expected = greedy_reference(model, PROMPTS, NEW_TOKENS)
    folder = rewritten(save(model, tmp_path / "ckpt"), stacked(model))
    assert ours(folder) == expected
    assert in_transformers(as_cell(folder)) == expected


def test_a_checkpoint_as_transformers_saves_it_is_used_as_it_is(model: Any, tmp_path: Path) -> None:
    folder = save(model, tmp_path / "ckpt")
    assert as_cell(folder) == folder


def without(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {k: v for k, v in tensors.items() if part not in k}


def narrow(part: str, rows: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {k: v[:rows] if part in k else v for k, v in tensors.items()}


def fewer_in_a_stack(made: Any) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """The last expert of one layer is missing."""
    part = "layers.1.mlp.experts.down_proj"
    return lambda tensors: {k: v[:-1] if part in k else v for k, v in stacked(made)(tensors).items()}


def test_what_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    made = random_model("mixtral")
    wrong = {
        r"lacks 3 of .*layers\.1\.block_sparse_moe\.experts\.3\.w1": without("layers.1.block_sparse_moe.experts.3."),
        r"layers\.2\.block_sparse_moe\.gate\.weight has shape \(4, 60\)": narrow("2.block_sparse_moe.gate", 4),
        r"layers\.1\.block_sparse_moe\.experts\.4\.w2\.weight has shape \(0, 44\)": fewer_in_a_stack(made),
    }
    for number, (message, change) in enumerate(wrong.items()):
        folder = rewritten(save(made, tmp_path / str(number)), change)
        with pytest.raises(StoreError, match=message):
            ours(folder)


def test_experts_missing_in_a_shard(tmp_path: Path) -> None:
    """The index names a shard that does not hold them any more."""
    folder = save(random_model("qwen3-moe"), tmp_path / "ckpt", max_shard_size="40KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lost = next(file for name, file in index["weight_map"].items() if "layers.2.mlp.experts.5.up_proj" in name)
    (folder / lost).write_bytes((folder / next(f for f in index["weight_map"].values() if f != lost)).read_bytes())
    with pytest.raises(StoreError, match=r"index .* lists .* that no shard holds: .*layers\.2\.mlp"):
        ours(folder)


def test_layers_that_guess_at_further_tokens_are_left_out(tmp_path: Path) -> None:
    """GLM-4.5 checkpoints hold one behind the last, which transformers leaves out, too."""
    made = random_model("glm4-moe")
    more = {"model.layers.3.eh_proj.weight": torch.ones(60, 120), "model.layers.3.mlp.gate.weight": torch.ones(6, 60)}
    folder = rewritten(save(made, tmp_path / "ckpt"), lambda tensors: tensors | more, num_nextn_predict_layers=1)
    assert ours(folder) == greedy_reference(made, PROMPTS, NEW_TOKENS)
    folder = rewritten(folder, lambda tensors: tensors, num_nextn_predict_layers=0)
    with pytest.raises(StoreError, match=r"no place for: model\.layers\.3"):
        ours(folder)


def generate(folder: Path, dtype: DType, compression: Compression | None = None, emulated: bool = False) -> Any:
    weights = PackedWeights.from_checkpoint(folder, dtype, folder.parent / "cache", compression=compression)
    at = Placement.all_on(Tier.CPU)
    policy = Policy(2, 2, at, at, at, lossy=Lossy(weights=compression))
    engine = weights.engine(policy, Device.open(EMULATED if emulated else HOST, 1), folder)
    sequences = to_full_length(PROMPTS, SamplingParams(max_tokens=NEW_TOKENS))
    try:
        engine.generate(sequences)
    finally:
        engine.close()
    return [s.new for s in sequences]


@pytest.mark.parametrize("emulated", [False, True])
def test_compressed_experts(model: Any, emulated: bool, tmp_path: Path) -> None:
    """Each expert's matrices for themselves; routers and their corrections stay as they are."""
    folder = save(model, tmp_path / "ckpt")
    with torch.no_grad():
        rounded = {}
        for name, parameter in model.state_dict().items():
            is_router = name.endswith("mlp.gate.weight") or "shared_expert_gate" in name
            how = FOUR.of_vocabulary if "embed" in name or "lm_head" in name else FOUR
            if parameter.dim() == 3:
                rounded[name] = torch.stack([fake_quantize(one, how) for one in parameter])
            else:
                rounded[name] = fake_quantize(parameter, how) if parameter.dim() == 2 and not is_router else parameter
        original = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(rounded)
        expected = greedy_reference(model, PROMPTS, NEW_TOKENS)
        model.load_state_dict(original)
    assert generate(folder, DType.FLOAT32, FOUR, emulated) == expected


def test_a_correction_stays_float32(tmp_path: Path) -> None:
    """In bfloat16, corrections that are large beside scores would be rounded to halves, so that others are chosen. The
    same for all experts they change nothing."""
    made = random_model("glm4-moe").to(torch.bfloat16)
    tokens = []
    for offset in (0.0, 64.0):
        for buffer_name, buffer in made.named_buffers():
            if "correction" in buffer_name:
                buffer.data = buffer.data.float().round(decimals=4) + offset
        folder = save(made, tmp_path / str(offset))
        tokens.append(generate(folder, DType.BFLOAT16))
        with open_source(folder) as source:
            shape = source.shape
    assert tokens[0] == tokens[1]
    dummy = prepare_checkpoint(ModelSpec(shape), DType.BFLOAT16, tmp_path / "dummy", no_progress)
    assert headers(dummy) == headers(folder) == {"float32"}


def headers(folder: Path) -> set[str]:
    """Element types of the corrections of a checkpoint."""
    with open_source(folder) as source:
        names = [name for own, name in source.names.items() if "correction" in own]
        return {source.checkpoint.header(name)[1] for name in names}


def test_what_is_not_finite_is_reported_by_layer(tmp_path: Path) -> None:
    """Also where it appears in an expert that only some tokens go through."""
    made = random_model("mixtral")
    with torch.no_grad():
        made.model.layers[1].mlp.experts.gate_up_proj[2] *= 1e30
    with pytest.raises(NotFinite, match="layer"):
        generate(save(made, tmp_path / "ckpt"), DType.FLOAT32)


@pytest.mark.parametrize("compression", [None, FOUR], ids=["plain", "4 bits"])
@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "glm-4.5-air"])
def test_any_expert_is_one_run_of_pages(name: str, compression: Compression | None) -> None:
    """Behind all that every token meets; all have the same size, so that a layer, its experts, or one of them is one
    run of bytes."""
    shape = replace(model_spec(name).shape, num_layers=2)
    packed = Model.of(shape, DType.BFLOAT16, compression).packed
    with_experts = [unit for unit in packed.units if unit.experts is not None]
    assert len(with_experts) == 2 - len(shape.options.get("dense_layers", ()))
    for unit in with_experts:
        check_blocks(unit, shape.options["experts"])
        plain = {e.tensor.spec.name for e in unit.entries if e.compression is None}
        assert {"router.weight", "attention_norm"} <= plain


def check_blocks(unit: PackedUnit, count: int) -> None:
    blocks = unit.experts
    assert blocks is not None
    assert blocks.count == count
    assert blocks.offset == unit.offset + unit.dense_bytes
    assert blocks.range(count - 1)[0] + blocks.num_bytes == unit.offset + unit.num_bytes
    assert blocks.offset % PAGE == blocks.num_bytes % PAGE == 0
    for entry in unit.entries:
        start, size = (unit.offset, unit.dense_bytes)
        if entry.tensor.expert is not None:
            start, size = blocks.range(entry.tensor.expert)
        assert start <= entry.offset
        assert entry.offset + entry.num_bytes <= start + size
