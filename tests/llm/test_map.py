"""``LLM.map`` and ``LLM.chat``: answers are those of ``generate``; datasets come back as what they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from flexgen_bench import LLM, SamplingParams
from flexgen_bench.core.errors import UserError
from tests.support.tiny_text_models import CHAT_TEMPLATE, text_model

PROMPTS = ["one", "two and", "three is", "x" * 30, ""]
PARAMS = SamplingParams(max_tokens=5, temperature=0.7, seed=4)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("map")
    model = text_model(folder / "ckpt", "llama", chat_template=CHAT_TEMPLATE)
    with LLM(model, cache_dir=folder / "cache", threads=1, gpu="cpu") as made:
        yield made


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[str]:
    return [output.text for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("window", [1, 2, 100])
def test_rows_of_a_frame(llm: LLM, expected: list[str], window: int) -> None:
    """In windows of any size: each row has a random stream of its own."""
    frame = pd.DataFrame({"id": range(5), "q": PROMPTS}, index=list("abcde"))
    found = llm.map(frame, "q", PARAMS, output="a", window=window)
    assert list(found["a"]) == expected
    assert list(found.index) == list("abcde")
    assert list(frame.columns) == ["id", "q"]


def test_other_kinds_of_datasets(llm: LLM, expected: list[str]) -> None:
    import pyarrow as pa

    rows = [{"q": prompt} for prompt in PROMPTS]
    assert llm.map(rows, "q", PARAMS) == [{"q": q, "answer": a} for q, a in zip(PROMPTS, expected, strict=True)]
    assert llm.map(pa.table({"q": PROMPTS}), "q", PARAMS)["answer"].to_pylist() == expected
    datasets = pytest.importorskip("datasets")
    found = llm.map(datasets.Dataset.from_list(rows), "q", PARAMS)
    assert found.column_names == ["q", "answer"]
    assert list(found["answer"]) == expected


def test_rows_may_be_conversations_or_ids(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    params = SamplingParams(max_tokens=4)
    import numpy as np

    as_read_from_parquet = pd.DataFrame({"q": [np.array(messages, dtype=object), np.array([5, 6])]})
    found = llm.map([{"q": messages}, {"q": [5, 6]}], "q", params)
    assert list(llm.map(as_read_from_parquet, "q", params)["answer"]) == [row["answer"] for row in found]
    assert [row["answer"] for row in found] == [
        llm.chat(messages, params)[0].text,
        llm.generate([5, 6], params)[0].text,
    ]


@pytest.mark.parametrize(
    ("dataset", "column", "output", "named"),
    [
        ([{"q": "a"}], "p", "answer", "column"),
        ([{"q": "a"}], "q", "q", "nothing is overwritten"),
        ([{"q": "a"}, {"q": 5}], "q", "answer", "q[1]"),
        (["a"], "q", "answer", "dataset"),
        ("text", "q", "answer", "dataset"),
        ({"q": ["a"]}, "q", "answer", "dataset"),
    ],
)
def test_what_cannot_be_mapped_is_named(llm: LLM, dataset: Any, column: str, output: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        llm.map(dataset, column, output=output)
    assert named in str(caught.value)


def test_several_conversations(llm: LLM) -> None:
    conversations = [[{"role": "user", "content": text}] for text in ("a", "bcd", "e" * 20)]
    params = SamplingParams(max_tokens=6)
    rendered = [f"user: {text}\nassistant: " for text in ("a", "bcd", "e" * 20)]
    assert [o.text for o in llm.chat(conversations, params)] == [o.text for o in llm.generate(rendered, params)]


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        ([{"role": "user"}], "content"),
        ([{"content": "a"}], "role"),
        ([{"role": "user", "content": "a", "tool_calls": [{"id": "1"}]}], "tool_calls"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "image_url"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([{"role": "assistant", "content": "a"}], "the user begins"),
        ([[{"role": "user", "content": "a"}], [{"role": "user", "content": 5}]], "messages[1]"),
    ],
)
def test_what_is_no_conversation_is_named(llm: LLM, messages: Any, named: str) -> None:
    with pytest.raises(UserError) as caught:
        llm.chat(messages)
    assert named.lower() in str(caught.value).lower()


def test_a_template_is_run_in_a_sandbox(tmp_path: Path) -> None:
    """One that reaches for the interpreter is refused, and nothing of it happens."""
    trap = tmp_path / "trap"
    evil = (
        "{{ messages.__class__.__mro__[-1].__subclasses__() }}"
        + f"{{{{ cycler.__init__.__globals__.os.mkdir('{trap}') }}}}"
    )
    model = text_model(tmp_path / "ckpt", chat_template=evil)
    with (
        LLM(model, cache_dir=tmp_path / "cache", threads=1, gpu="cpu") as llm,
        pytest.raises(UserError, match="template"),
    ):
        llm.chat([{"role": "user", "content": "a"}])
    assert not trap.exists()


def test_a_trained_model_answers(smollm2: tuple[object, Path], shared_cache: Path) -> None:
    """SmolLM2's template and its end of a turn; the same tokens as transformers' own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2[1]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    with LLM(folder, cache_dir=shared_cache, threads=1, gpu="cpu") as llm:
        found = llm.chat(messages, SamplingParams(max_tokens=16))[0]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert list(found.token_ids) == out[0, inputs["input_ids"].shape[1] :].tolist()
    assert "Paris" in found.text
    assert found.finish_reason == "stop"
