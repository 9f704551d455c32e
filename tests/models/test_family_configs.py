"""Every entry of every family's config, changed: the tokens of transformers, or a refusal. Nothing is ignored that
changes a result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexgen_bench.checkpoints.source import open_source
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import to_full_length
from flexgen_bench.models.registry import family, shape_from_config
from tests.support.tiny_models import FAMILIES, HOST, MODELS, greedy_reference, random_model, random_prompts, save

PROMPTS = random_prompts([2, 13, 30])
NEW_TOKENS = 4
# What says nothing about a model's numbers: names, token ids, types, training, and how transformers computes.
_OTHER = {
    "_name_or_path",
    "architectures",
    "model_type",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "init_std",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "is_encoder_decoder",
    "problem_type",
    "layerdrop",
    "task_specific_params",
}
_ACTIVATIONS = {"hidden_act", "hidden_activation", "activation_function"}


def changes(value: Any, key: str) -> Iterator[Any]:
    """Other values for an entry."""
    if isinstance(value, bool):
        yield not value
    elif key in _ACTIVATIONS:
        yield "relu"
        yield "no such function"
    elif isinstance(value, int):
        yield from (value * 2, None)
    elif isinstance(value, float):
        yield from (value * 3 + 0.1, None)
    elif isinstance(value, list) and value:
        yield [*value[1:], value[0]]
        yield value[:-1]
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from (value | {name: other} for other in changes(inner, name))
    elif value is None:
        yield from (3, 0.5, True)
    elif isinstance(value, str):
        yield "linear" if key == "rope_type" else value + "x"


def ours(folder: Path) -> list[list[int]]:
    weights = PackedWeights.from_checkpoint(folder, DType.FLOAT32, folder.parent / "cache")
    engine = weights.engine(Policy(3, 1), Device.open(HOST, 1), folder)
    sequences = to_full_length(PROMPTS, SamplingParams(max_tokens=NEW_TOKENS))
    try:
        engine.generate(sequences)
    finally:
        engine.close()
    return [s.new for s in sequences]


def theirs(folder: Path) -> list[list[int]] | str:
    """Or why not: transformers does not read or run it, or other tensors than there are."""
    try:
        model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            return "other tensors"
        return greedy_reference(model.eval(), PROMPTS, NEW_TOKENS)
    except Exception:  # of whatever kind: it says no
        return "no"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["llama-scaled-rope", "opt", *sorted(FAMILIES)])
def test_every_entry(name: str, tmp_path: Path) -> None:
    """What transformers does not read (most entries may not be null there) may be read here."""
    folder = save(random_model(name), tmp_path / "ckpt")
    text = (folder / "config.json").read_text()
    config: Mapping[str, Any] = json.loads(text)
    wrong = []
    for key, value in config.items():
        if key in _OTHER:
            continue
        for other in changes(value, key):
            (folder / "config.json").write_text(json.dumps({**config, key: other}))
            expected = theirs(folder)
            try:
                found = ours(folder)
            except (UserError, StoreError):
                continue
            if expected not in (found, "no"):
                wrong.append((key, other))
    assert not wrong


@pytest.mark.parametrize("name", sorted(MODELS | FAMILIES))
def test_a_shape_and_its_config_say_the_same(name: str, tmp_path: Path) -> None:
    with open_source(save(random_model(name), tmp_path / "ckpt")) as source:
        shape = source.shape
    kind = family(shape.family)
    config = kind.config_from_shape(shape) | {"architectures": [kind.architecture], "model_type": kind.model_type}
    assert shape_from_config(config, shape.name) == shape
