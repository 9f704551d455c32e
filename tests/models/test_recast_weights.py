"""Trained weights through families that no package carries: SmolLM2 recast as another family gives SmolLM2's tokens;
with biases, experts or windows of its own, those of transformers on the same checkpoint.

Random weights hide what trained ones show: activations of very different sizes, and logits that lie apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen_bench import LLM, SamplingParams
from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.model import DType
from scripts.recast_smollm2 import Recast, recast
from tests.support.shapes import no_progress
from tests.support.tiny_models import greedy_reference

# Of the default tests: the first layers and tokens of the trained model, whose answers are no longer words.
LAYERS, VOCAB = 2, 2048
PROMPTS = [[n * n % (VOCAB - 3) + 3 for n in range(1, 1 + length)] for length in (5, 23, 40)]
NEW = 8
EXACT = {"qwen2": Recast("qwen2"), "mistral": Recast("mistral", window=4096), "mixtral": Recast("mixtral")}
PERTURBED = {
    "qwen2": Recast("qwen2", perturbed=True),
    "mistral": Recast("mistral", window=6),
    "mixtral": Recast("mixtral", experts=5, perturbed=True),
    "mixtral-window": Recast("mixtral", experts=3, window=9, perturbed=True),
}


def cut(wanted: Recast) -> Recast:
    return Recast(**vars(wanted) | {"layers": LAYERS, "vocab": VOCAB})


def tokens_of(folder: Path, prompts: Sequence[Any], cache: Path, count: int = NEW) -> list[list[int]]:
    with LLM(folder, cache_dir=cache, dtype="float32", gpu="cpu") as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=count, ignore_eos=True))
    return [list(output.token_ids) for output in outputs]


def transformers_tokens(folder: Path, prompts: Sequence[Sequence[int]], count: int = NEW) -> list[list[int]]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return greedy_reference(model.eval(), prompts, count)


@pytest.fixture(scope="module")
def trained(smollm2: tuple[ModelSpec, Path]) -> Path:
    return smollm2[1]


@pytest.fixture(scope="module")
def llama_tokens(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Of SmolLM2 as it is, cut."""
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32, num_hidden_layers=LAYERS)
    model.resize_token_embeddings(VOCAB)
    return greedy_reference(model.eval(), PROMPTS, NEW)


@pytest.mark.parametrize("kind", EXACT)
def test_recast_exactly(kind: str, trained: Path, llama_tokens: list[list[int]], tmp_path: Path) -> None:
    """Zero biases, a window that no text leaves, copied experts: the same model."""
    folder = recast(trained, tmp_path / "recast", cut(EXACT[kind]), DType.FLOAT32, no_progress)
    assert tokens_of(folder, PROMPTS, tmp_path) == llama_tokens


@pytest.mark.parametrize("kind", PERTURBED)
def test_recast_and_perturbed(kind: str, trained: Path, llama_tokens: list[list[int]], tmp_path: Path) -> None:
    """Biases, routes and windows count: the tokens are not SmolLM2's, and they are those of transformers."""
    folder = recast(trained, tmp_path / "recast", cut(PERTURBED[kind]), DType.FLOAT32, no_progress)
    found = tokens_of(folder, PROMPTS, tmp_path)
    assert found == transformers_tokens(folder, PROMPTS)
    assert found != llama_tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "mistral", "mixtral"])
@pytest.mark.parametrize("perturbed", [False, True], ids=["exact", "perturbed"])
def test_the_whole_model(kind: str, perturbed: bool, trained: Path, tmp_path: Path) -> None:
    """All layers and tokens, on a text."""
    wanted = Recast(kind, window=6 if perturbed and kind == "mistral" else None, experts=3, perturbed=perturbed)
    folder = recast(trained, tmp_path / "recast", wanted, DType.FLOAT32, no_progress)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    prompts = [tokenizer(text).input_ids for text in ("The capital of France is", "One, two, three, four,")]
    found = tokens_of(folder, prompts, tmp_path, 24)
    assert found == transformers_tokens(folder if perturbed else trained, prompts, 24)
    if not perturbed:
        assert tokenizer.decode(found[0]).startswith(" Paris")
