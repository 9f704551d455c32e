"""What is taken for a prompt, a stop string, a number, and what is refused: by name, before
anything runs."""

from __future__ import annotations

import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from flexgen_bench import LLM, SamplingParams
from flexgen_bench.core.errors import UserError
from flexgen_bench.engine.outputs import Score
from flexgen_bench.schedule.prefix_tree import ScoreRequest
from tests.support.tiny_text_models import VOCAB, text_model

ONE = SamplingParams(max_tokens=1)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = text_model(tmp_path_factory.mktemp("kinds") / "ckpt", "llama")
    with LLM(folder, dtype="float32", cache_dir=folder.parent, threads=1, gpu="cpu") as made:
        yield made


INTEGERS = [
    np.array([5, 6, 7]),
    np.array([5, 6, 7], np.uint8),
    torch.tensor([5, 6, 7]),
    torch.tensor([5, 6, 7], dtype=torch.int32),
    [np.int64(5), np.int32(6), 7],
    list(torch.tensor([5, 6, 7])),
    (5, 6, 7),
    range(5, 8),
    array.array("i", [5, 6, 7]),
]


@pytest.mark.parametrize("ids", INTEGERS, ids=lambda ids: type(ids).__name__)
def test_integers_of_any_library_are_ids(llm: LLM, ids: Any) -> None:
    """numpy's were refused, alone and in lists."""
    expected = llm.generate([[5, 6, 7]], ONE)
    for prompts in (ids, [ids], (ids,)):
        (output,) = llm.generate(prompts, ONE)
        assert output == expected[0]
        assert all(type(i) is int for i in (*output.prompt, *output.prompt_token_ids))
    assert llm.generate(["ab", ids], ONE)[1].token_ids == expected[0].token_ids
    assert llm.score([ids], [ids]) == llm.score([[5, 6, 7]], [[5, 6, 7]])
    asked = [ScoreRequest(ids, np.int64(1))]  # type: ignore[arg-type]
    assert llm.score_tokens(asked) == llm.score_tokens([ScoreRequest([5, 6, 7], 1)])
    (mine,) = llm.log_probabilities([ids])
    assert mine.shape == (2, VOCAB)


# Each as the only prompt, or as one of several: never a prompt.
NO_PROMPT = [
    (None, "token ids"),
    (7, "token ids"),
    (np.int64(7), "token ids"),
    (1.5, "token ids"),
    (b"abc", "decode them to text"),
    (bytearray(b"abc"), "decode them to text"),
    (memoryview(b"abc"), "decode them to text"),
    ({"input_ids": [5]}, "value that is meant"),
    ({5, 6}, "Make a list"),
    ((i for i in (5, 6)), "Make a list"),
    (np.array([[5, 6]]), r"shape \(1, 2\).*without padding"),
    (torch.tensor([[5, 6]]), r"shape \(1, 2\)"),
    (True, "token ids"),
]
# Each a list that is no list of ids.
NO_IDS = [
    [1.0, 2.0],
    [True, False],
    [5, 6.5],
    [5, None],
    [5, "a"],
    [5, [6]],
    [5, True],
    np.array([1.0, 2.0]),
    np.array([True]),
    torch.tensor([1.0]),
    torch.tensor([True]),
    [np.float32(1.0), 5],
    [[5]],
    [torch.tensor([5]), torch.tensor([6])],
]


@pytest.mark.parametrize(("given", "message"), NO_PROMPT, ids=lambda value: type(value).__name__)
def test_what_is_no_prompt_is_refused(llm: LLM, given: Any, message: str) -> None:
    """``bytes`` were taken for ids."""
    with pytest.raises(UserError, match=f"^prompts = .*{message}|^prompts\\[0\\] = .*{message}"):
        llm.generate(given, ONE)
    with pytest.raises(UserError, match=r"^prompts\[1\] = "):
        llm.generate(["fine", given], ONE)
    with pytest.raises(UserError, match=r"^contexts\[1\] = "):
        llm.score(["fine", given], ["a", "b"])
    with pytest.raises(UserError, match=r"^continuations\[1\] = "):
        llm.score(["fine", "fine"], ["a", given])
    with pytest.raises(UserError, match=r"^requests\[0\].tokens = "):
        llm.score_tokens([ScoreRequest(given, 1)])


@pytest.mark.parametrize("given", NO_IDS, ids=lambda value: f"{type(value).__name__}: {value}")
def test_what_is_no_list_of_ids_is_refused(llm: LLM, given: Any) -> None:
    with pytest.raises(UserError, match=r"^prompts\[1\] = .*integers"):
        llm.generate(["fine", given], ONE)
    with pytest.raises(UserError, match=r"^contexts\[0\] = .*integers"):
        llm.score([given], [[5]])
    with pytest.raises(UserError, match=r"^requests\[1\].tokens = .*integers"):
        llm.score_tokens([ScoreRequest([5, 6], 1), ScoreRequest(given, 1)])


@pytest.mark.parametrize("text", ["bad \ud83d text", "\udc00", "\ud83d\ude00", "a" * 500 + "\ud83d"])
def test_half_a_character_is_named_before_anything_runs(llm: LLM, text: str) -> None:
    """A lone surrogate was a bare TypeError of the tokenizer for the whole batch."""
    done: list[int] = []
    with pytest.raises(UserError, match=r"^prompts\[2\] = .*UTF-8.*surrogate"):
        llm.generate(["fine", "fine", text], ONE, lambda index, output: done.append(index))
    assert not done
    with pytest.raises(UserError, match=r"^contexts\[1\] = .*surrogate"):
        llm.score(["a", text], ["b", "c"])
    with pytest.raises(UserError, match=r"^continuations\[1\] = .*surrogate"):
        llm.score(["a", "b"], ["b", text])
    with pytest.raises(UserError) as caught:
        llm.generate(text, ONE)
    assert str(caught.value).encode(), "can be printed"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "at least one token"),
        ([5, VOCAB], "token ids from 0"),
        ([-1], "token ids from 0"),
        ([5] * 129, "128 positions"),
        ([2**70], "token ids from 0"),
    ],
)
def test_ids_that_the_model_cannot_take(llm: LLM, ids: list[int], message: str) -> None:
    with pytest.raises(UserError, match=rf"^prompts\[1\] = .*{message}"):
        llm.generate(["fine", ids], SamplingParams(max_tokens=2))
    if ids:
        name = r"contexts\[1\] \+ continuations\[1\]"
        with pytest.raises(UserError, match=f"^{name} = .*{message}"):
            llm.score([[5], ids], [[5], [5]])


def test_lists_of_the_wrong_kind(llm: LLM) -> None:
    for given in ([], (), np.array([]), np.array([], np.int64)):
        with pytest.raises(UserError, match="at least one prompt"):
            llm.generate(given, ONE)  # type: ignore[arg-type]
    for given in ("ab", None, 5, {"a": 1}, b"ab"):
        with pytest.raises(UserError, match=r"^contexts = "):
            llm.score(given, ["a"])  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"^continuations = "):
            llm.score(["a"], given)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"^requests"):
            llm.score_tokens(given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="as many as contexts"):
        llm.score(["a", "b"], ["c"])
    with pytest.raises(UserError, match=r"continuations\[0\].*same kind"):
        llm.score(["a"], [[5]])
    with pytest.raises(UserError, match=r"requests\[0\].start = 1.5"):
        llm.score_tokens([ScoreRequest([5, 6], 1.5)])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"continuations\[0\] = ''.*at least one token"):
        llm.score(["a"], [""])
    assert llm.generate(np.array(["ab", "cd"]), ONE)[1].prompt == "cd"  # type: ignore[arg-type]
    assert isinstance(llm.score(("a",), ("b",))[0], Score)


def test_stop_as_people_write_it(llm: LLM) -> None:
    """``stop=None`` was a TypeError; a single string is one stop string, not its letters."""
    assert [SamplingParams(stop=s).stop for s in (None, (), [], "ab", ["ab"], ("a", "b"))] == [
        (),
        (),
        (),
        ("ab",),
        ("ab",),
        ("a", "b"),
    ]
    assert llm.generate("ab", SamplingParams(max_tokens=2, stop=None))[0].finish_reason


@pytest.mark.parametrize("bad", ["", [""], ["a", ""], [None], [5], 5, b"ab", [b"ab"], {"a": 1}, {"a"}, True])
def test_what_is_no_stop_string_is_refused(bad: Any) -> None:
    with pytest.raises(UserError, match=r"^stop = .*strings"):
        SamplingParams(stop=bad)
    with pytest.raises(UserError, match=r"^stop\[1\] = .*surrogate"):
        SamplingParams(stop=["a", "\ud83d"])


def test_numbers_of_any_library() -> None:
    found = SamplingParams(
        max_tokens=np.int64(3),
        temperature=np.float32(0.5),
        top_k=torch.tensor(4),
        top_p=np.float64(0.5),  # type: ignore[arg-type]
        repetition_penalty=2,
        seed=np.uint8(7),
        stop_token_ids=np.array([5, 6]),  # type: ignore[arg-type]
        logprobs=np.int32(2),  # type: ignore[arg-type]
    )
    assert found == SamplingParams(3, 0.5, 4, 0.5, 2.0, (), (5, 6), False, 7, 2)
    assert all(type(v) in (int, float, bool, tuple) for v in vars(found).values())
    assert len({found, SamplingParams()}) == 2
    assert SamplingParams(stop_token_ids=None).stop_token_ids == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", v) for v in (True, 1.0, "3", None, np.float64(3.0), torch.tensor([3]), -1)]
    + [("temperature", v) for v in ("1", None, True, float("inf"), 1j)]
    + [("top_p", v) for v in (1.5, -0.5, float("nan"), None)]
    + [("top_k", 1.0), ("top_k", True)]
    + [("repetition_penalty", v) for v in (float("nan"), float("inf"), "x")]
    + [("seed", None), ("seed", 1.5), ("seed", False)]
    + [("stop_token_ids", v) for v in (5, [-1], [1.5], [True], "ab", b"ab", [[5]])]
    + [("ignore_eos", "yes"), ("ignore_eos", 1)],
)
def test_numbers_of_the_wrong_kind_name_their_field(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{field} = "):
        SamplingParams(**{field: value})
