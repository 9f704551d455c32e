"""The small OPT: what its training script makes of a text, and how a trained model becomes a checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flexgen_bench.checkpoints.prepared import checkpoint_folder, is_prepared, prepare_checkpoint, trained_folder
from flexgen_bench.checkpoints.reader import read_config
from flexgen_bench.config.build import model_spec
from flexgen_bench.core.cell import ModelSpec, WeightSource
from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.model import DType
from flexgen_bench.models.registry import shape_from_config
from tests.support.tiny_models import random_model, save

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_small_opt.py"
TEXT = "In the beginning God created the heaven and the earth.\n" * 9 + "Grüße, 漢字!\n"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_small_opt", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_tokenizer_begins_sequences_as_opt_does(script: ModuleType, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    script.tokenizer_of(TEXT, 290, 64).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXT).input_ids
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.pad_token_id == 1
    assert tokenizer.decode(ids[1:]) == TEXT
    assert max(ids) < 290
    with pytest.raises(StoreError, match="tokens instead of 5000"):
        script.tokenizer_of(TEXT, 5000, 64)


def test_the_same_seed_trains_the_same_weights(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "STEPS", 12)
    monkeypatch.setattr(script, "WARMUP", 2)
    tokens = torch.arange(4, 120).repeat(2)

    def trained() -> dict[str, torch.Tensor]:
        model = random_model("opt").train()
        before = script.judge(model, tokens, 32, 2)
        script.train(model, tokens, 32, 2)
        assert script.judge(model, tokens, 32, 2)["perplexity"] < before["perplexity"]
        return dict(model.state_dict())

    first, second = trained(), trained()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_trained_model_is_a_checkpoint_like_any_other(tmp_path: Path) -> None:
    model = random_model("opt")
    folder = trained_folder("tiny", tmp_path)
    shape = shape_from_config(read_config(save(model, tmp_path / "saved")), "tiny")
    spec = ModelSpec(shape, WeightSource.TRAINED, "tiny")
    with pytest.raises(StoreError, match=r"train_small_opt\.py"):
        prepare_checkpoint(spec, DType.BFLOAT16, tmp_path, lambda *_: None)
    save(model, folder)
    (folder / "tokenizer.json").write_text("{}")
    found = prepare_checkpoint(spec, DType.BFLOAT16, tmp_path, lambda *_: None)
    assert found == checkpoint_folder(spec, DType.BFLOAT16, tmp_path)
    assert read_config(found)["dtype"] == "bfloat16"
    assert (found / "tokenizer.json").exists()
    assert is_prepared(spec, DType.BFLOAT16, tmp_path)
    save(random_model("opt", seed=1), folder)
    assert not is_prepared(spec, DType.BFLOAT16, tmp_path), "trained again: other weights"


def test_the_model_that_is_named_is_the_one_that_is_trained(script: ModuleType) -> None:
    spec = model_spec(script.MODEL)
    assert spec.weights is WeightSource.TRAINED
    assert trained_folder(spec.location, Path("/x")) == trained_folder(script.MODEL, Path("/x"))
