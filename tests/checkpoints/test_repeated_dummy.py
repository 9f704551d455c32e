"""Large dummy models: one layer on disk, under the names of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_bench.checkpoints import dummy_weights
from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.checkpoints.reader import Checkpoint
from flexgen_bench.config.build import model_spec
from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.units import GB
from flexgen_bench.models.registry import weight_bytes
from flexgen_bench.runner.feasibility import checkpoint_bytes
from tests.support.shapes import llama_shape, no_progress, opt_shape

SHAPES = [
    opt_shape(num_layers=9, hidden_size=96, head_dim=32, embed_dim=96),
    llama_shape(num_layers=9, hidden_size=96, num_heads=4, head_dim=24),
]


@pytest.fixture(params=SHAPES, ids=lambda shape: shape.family)
def made(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelShape, Path]:
    monkeypatch.setattr(dummy_weights, "REPEATED_FROM_BYTES", 0)
    shape: ModelShape = request.param
    return shape, prepare_checkpoint(ModelSpec(shape), DType.BFLOAT16, tmp_path, no_progress)


def test_the_file_holds_one_layer(made: tuple[ModelShape, Path]) -> None:
    shape, folder = made
    size = (folder / "pytorch_model.bin").stat().st_size
    assert size < weight_bytes(shape, DType.BFLOAT16) / 3


def test_transformers_and_the_engine_read_the_same_whole_model(made: tuple[ModelShape, Path]) -> None:
    from transformers import AutoModelForCausalLM

    _, folder = made
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    checkpoint = Checkpoint(folder)
    named = dict(model.named_parameters())
    assert set(named) == set(checkpoint.names())
    for name, parameter in named.items():
        assert torch.equal(parameter, checkpoint.tensor(name)), name
    layers = {name: name.replace(".layers.8.", ".layers.0.") for name in named if ".layers.8." in name}
    assert layers
    for name, first in layers.items():
        assert torch.equal(named[name], named[first])
        assert named[name].std() > 0


def test_a_copy_of_its_own_takes_memory_for_every_layer(made: tuple[ModelShape, Path]) -> None:
    """What the baselines do when they make a model resident; shared numbers would all be one piece of the cache."""
    from baselines import hf_generate as hf

    _, folder = made
    model = hf.load_model(folder, torch.bfloat16)
    hf.make_resident(model)
    addresses = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(addresses)) == len(addresses)


def test_only_large_dummies_repeat() -> None:
    small, large = (model_spec(name) for name in ("opt-2.7b", "opt-175b"))
    assert checkpoint_bytes(small, DType.FLOAT16) == weight_bytes(small.shape, DType.FLOAT16)
    assert checkpoint_bytes(large, DType.FLOAT16) == pytest.approx(4.9 * GB, rel=0.02)
    trained = ModelSpec(large.shape, WeightSource.HUB, "facebook/opt-175b")
    assert checkpoint_bytes(trained, DType.FLOAT16) == weight_bytes(large.shape, DType.FLOAT16)
