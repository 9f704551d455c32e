"""Stop strings: where they end a text, what of it is shown, and what is held back until it is sure."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_bench.engine.incremental_decoder import IncrementalDecoder
from flexgen_bench.engine.text_stream import TextStream
from flexgen_bench.engine.token_pieces import TokenPieces
from tests.support.tiny_tokenizers import CHAT_END, END, byte_level, ids_of, sentencepiece


@cache
def made(kind: str) -> Any:
    return {"byte-level": byte_level, "sentencepiece": sentencepiece}[kind]()


def stream(stop: tuple[str, ...], kind: str = "byte-level", prompt: tuple[int, ...] = ()) -> TextStream:
    pieces = TokenPieces(made(kind))
    return TextStream(IncrementalDecoder(pieces, prompt), pieces.special, stop)


def ids(text: str) -> list[int]:
    return list(made("byte-level").encode(text, add_special_tokens=False))


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab c\n😀é", max_size=30),
    stop=st.lists(st.text(alphabet="ab c\n😀é", min_size=1, max_size=5), max_size=3),
    seed=st.integers(0, 2**16),
)
def test_any_text_ends_before_its_first_stop_string(text: str, stop: list[str], seed: int) -> None:
    """Tokens of any lengths, hidden ones between them. What has been shown is never taken back, and
    what is sure is shown."""
    draw, tokens = random.Random(seed), []
    while text:  # split otherwise than the tokenizer does
        size = draw.randrange(1, 6)
        tokens += ids(text[:size]) + [CHAT_END] * draw.randrange(2)
        text = text[size:]
    written = made("byte-level").decode(tokens, skip_special_tokens=True)
    found = stream(tuple(stop))
    shown = ""
    for count, token in enumerate(tokens, 1):
        shown += found.put(token)
        so_far = made("byte-level").decode(tokens[:count], skip_special_tokens=True)
        ends = [so_far.find(s) for s in stop if s in so_far]
        assert found.stopped == bool(ends)
        if ends:
            written = so_far[: min(ends)]
            break
        whole = so_far.rstrip("\ufffd")
        held = len(whole) - len(shown)
        # Text is held back where a stop string may have begun, and nowhere else.
        logit_rows = max((n for s in stop for n in range(len(s)) if whole.endswith(s[:n])), default=0)
        assert held == logit_rows
    shown += found.finish()
    assert shown == found.text == written


@pytest.mark.parametrize(
    ("said", "stop", "text"),
    [
        ("Yes.\nNo", "\n", "Yes."),
        ("Yes.\n\nNo", ".\n\n", "Yes"),
        ("a b c", " b", "a"),
        ("x😀y", "😀", "x"),
        ("x😀y", "😀y", "x"),
        ("你好世界", "好", "你"),
        ("abc", "d", "abc"),
        ("one STOPtwo", "STOP", "one "),
        ("aab", "ab", "a"),
        ("é", "é", ""),
    ],
)
def test_stop_strings_of_all_kinds(said: str, stop: str, text: str) -> None:
    """Leading spaces, line breaks, several tokens, characters of several bytes, a beginning that
    was none."""
    found = stream((stop,))
    shown = [found.put(token) for token in ids(said)]
    assert "".join(shown) + found.finish() == text
    assert found.stopped == (stop in said)


def test_what_comes_after_the_stop_string_is_ignored() -> None:
    found = stream(("b",))
    assert [found.put(t) for t in ids("a") + ids("b") + ids("c")] == ["a", "", ""]
    assert (found.finish(), found.text, found.stopped) == ("", "a", True)


@pytest.mark.parametrize(
    ("said", "stop", "text"),
    [
        (["hello", "<|im_end|>", "is"], "<|im_end|>", "hello"),
        (["hello", "</s>", "is"], "</s>", "hello"),
        (["hello", "\n", "<|im_end|>", "\n", "is"], "\n<|im_end|>\n", "hello"),
        (["hello", "<|im_end|>", "\n", "is"], "<|im_end|>\n", "hello"),
        (["hello", "<|im_end|>", "is"], "</s>", "hellois"),  # another special token is hidden
        (["hello", "<|im_end|>", "is"], "hellois", ""),  # and does not part what it stands between
        (["hello", "<|im_end|>", "is"], "im_end", "hellois"),  # nothing that is shown
    ],
)
def test_stop_strings_with_special_tokens(said: list[str], stop: str, text: str) -> None:
    """``stop=["<|im_end|>"]`` never ended anything: it was looked for in text without special
    tokens."""
    tokenizer = made("sentencepiece")
    found = stream((stop,), "sentencepiece", tuple(ids_of(tokenizer, "▁is")))
    for token in ids_of(tokenizer, *said):
        found.put(token)
    found.finish()
    assert (found.text, found.stopped) == (text, text != "hellois")


def test_special_and_other_stop_strings_together() -> None:
    """The first of them ends the text, whichever it is."""
    for first, second in ((ids("."), [CHAT_END]), ([CHAT_END], ids("."))):
        found = stream((".", "<|im_end|>"))
        assert not found.follow(ids("ab"))
        assert found.follow(ids("ab") + first)
        assert found.follow(ids("ab") + first + second)
        assert found.text == "ab"


def test_an_incomplete_character_at_the_end() -> None:
    """It is withheld while there may be more, and U+FFFD when there is not."""
    whole = ids("a😀")
    found = stream(())
    assert "".join(found.put(t) for t in whole[:-1]) == "a"
    assert found.finish() == "\ufffd"
    assert found.text == "a\ufffd"


def test_the_first_space_can_stop() -> None:
    tokenizer = made("sentencepiece")
    for prompt, stopped in ((ids_of(tokenizer, "▁is"), True), ([], False)):
        found = stream((" Paris",), "sentencepiece", tuple(prompt))
        assert found.follow(ids_of(tokenizer, "▁Paris")) is stopped
        found.finish()
        assert found.text == ("" if stopped else "Paris")


def test_text_without_a_tokenizer_is_empty() -> None:
    found = TextStream(None, {})
    assert (found.put(END), found.finish(), found.text, found.count) == ("", "", "", 1)
