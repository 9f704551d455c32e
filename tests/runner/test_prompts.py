"""Prompts: exact lengths, distinct, the same every time, from the checkpoint's own tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from flexgen_bench.config.build import model_spec
from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.runner.prompts import build_prompts, read_passages
from tests.support.shapes import opt_shape


def work(kind: PromptKind = PromptKind.SYNTHETIC, **changes: int) -> Workload:
    values = {"num_prompts": 7, "prompt_len": 9, "gen_len": 4} | changes
    return Workload("test", kind, **values)


def test_synthetic_prompts() -> None:
    shape = model_spec("opt-125m").shape
    prompts = build_prompts(work(), Path("unused"), shape)
    assert [len(p) for p in prompts] == [9] * 7
    assert len({tuple(p) for p in prompts}) == 7
    assert all(4 <= token < shape.vocab_size for p in prompts for token in p)
    assert build_prompts(work(), Path("unused"), shape) == prompts
    assert build_prompts(work(seed=1), Path("unused"), shape) != prompts


def test_more_prompts_than_there_can_be() -> None:
    with pytest.raises(UserError, match="distinct"):
        build_prompts(work(prompt_len=1, num_prompts=100), Path("unused"), opt_shape(vocab_size=64))


def test_too_long_for_the_model() -> None:
    with pytest.raises(UserError, match="48 positions"):
        build_prompts(work(prompt_len=45), Path("unused"), opt_shape())


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no tokenizer.*workload=32-32"):
        build_prompts(work(PromptKind.TEXT), tmp_path, opt_shape())


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(StoreError, match="cannot be loaded"):
        build_prompts(work(PromptKind.TEXT), tmp_path, opt_shape())


def test_passages_are_many_and_long_enough() -> None:
    passages = read_passages()
    assert len(passages) >= 24
    assert len(set(passages)) == len(passages)
    assert all(len(p.split()) >= 90 and "#" not in p for p in passages)


def test_text_prompts(smollm2: tuple[ModelSpec, Path]) -> None:
    spec, folder = smollm2
    wanted = work(PromptKind.TEXT, num_prompts=24, prompt_len=128, min_prompt_len=16, gen_len=32)
    prompts = build_prompts(wanted, folder, spec.shape)
    lengths = [len(p) for p in prompts]
    assert (min(lengths), max(lengths)) == (16, 128)
    assert len(set(lengths)) == 24, "spread evenly"
    assert lengths != sorted(lengths), "long and short ones are mixed"
    assert build_prompts(wanted, folder, spec.shape) == prompts
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, passage in zip(prompts, read_passages(), strict=True):
        assert passage.startswith(tokenizer.decode(prompt)[:40])


def test_text_prompts_longer_and_more_than_the_passages(smollm2: tuple[ModelSpec, Path]) -> None:
    spec, folder = smollm2
    wanted = work(PromptKind.TEXT, num_prompts=60, prompt_len=700, min_prompt_len=600)
    prompts = build_prompts(wanted, folder, spec.shape)
    assert {len(p) for p in prompts} <= set(range(600, 701))
    assert len({tuple(p[:40]) for p in prompts}) == 60
