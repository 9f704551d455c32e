"""Text from tokens one at a time: the same as of all of them at once, in the context of the prompt,
at a constant cost."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_bench.engine.incremental_decoder import IncrementalDecoder
from flexgen_bench.engine.token_pieces import TokenPieces
from tests.support.tiny_tokenizers import KINDS, LINES, SPECIAL, byte_level, ids_of, sentencepiece

FALLBACK = ["sentencepiece", "no first space"]


@cache
def tokenizer(kind: str) -> Any:
    return KINDS[kind]()


@cache
def pieces(kind: str) -> TokenPieces:
    return TokenPieces(tokenizer(kind))


def deltas(kind: str, prompt: list[int], ids: list[int]) -> list[str]:
    decoder = IncrementalDecoder(pieces(kind), prompt)
    return [*map(decoder.put, ids), decoder.finish()]


def whole(kind: str, ids: list[int]) -> str:
    """The tokenizer's own text of all ids."""
    return tokenizer(kind).decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def by_bytes(kind: str, ids: list[int]) -> str:
    """All ids of a byte-fallback kind at once. The library's own decoder gives up a whole run of
    bytes for one that is wrong."""
    data = b""
    for name in tokenizer(kind).convert_ids_to_tokens(ids):
        if name is None or name in SPECIAL:
            continue
        is_byte = name.startswith("<0x")
        data += bytes([int(name[3:5], 16)]) if is_byte else name.replace("▁", " ").encode()
    text = data.decode(errors="surrogateescape")  # each byte that is part of no character by itself
    text = "".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in text)
    return text.removeprefix(" ") if kind == "sentencepiece" else text


def all_ids(kind: str) -> st.SearchStrategy[list[int]]:
    """Also ids that the tokenizer does not know."""
    return st.lists(st.integers(0, max(tokenizer(kind).get_vocab().values()) + 3), max_size=24)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_joined_it_is_the_text_of_all_tokens(kind: str, data: st.DataObject) -> None:
    """Any ids after any prompt."""
    prompt, ids = data.draw(all_ids(kind)), data.draw(all_ids(kind))
    decode = by_bytes if kind in FALLBACK else whole
    before, both = decode(kind, prompt), decode(kind, prompt + ids)
    while not both.startswith(before):  # the new tokens complete the prompt's last character
        before = before[:-1]
    assert "".join(deltas(kind, prompt, ids)) == both[len(before) :]


@pytest.mark.parametrize("kind", ["byte-level", *FALLBACK])
@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1), cut=st.integers(0, 20), end=st.integers(0, 3))
def test_characters_come_whole(kind: str, text: str, cut: int, end: int) -> None:
    """Of any text that is cut anywhere into prompt and answer, no character is ever shown in parts,
    and all is as in the library."""
    ids = tokenizer(kind).encode(text, add_special_tokens=False)
    prompt, new = ids[:cut], ids[cut : len(ids) - end]
    *parts, rest = deltas(kind, prompt, new)
    assert set(rest) <= {"\ufffd"}
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(parts)
    if kind == "byte-level" and not end:
        assert not rest
        text_of_prompt = whole(kind, prompt).rstrip("\ufffd") if "\ufffd" not in text else None
        assert text_of_prompt is None or text_of_prompt + "".join(parts) == text


def test_each_token_gives_its_text_at_once() -> None:
    """Nothing is held back but parts of characters."""
    ids = ids_of(tokenizer("sentencepiece"), "▁Paris", "😀", ".", "▁", "▁is")
    prompt = ids_of(tokenizer("sentencepiece"), "▁is")
    assert deltas("sentencepiece", prompt, ids) == [" Paris", "", "", "", "😀", ".", " ", " is", ""]


@pytest.mark.parametrize("kind", FALLBACK)
def test_a_wrong_byte_costs_itself_alone(kind: str) -> None:
    """The library's own stream of decoded text raises here ("Invalid prefix encountered"), and its
    decoder shows seven U+FFFD."""
    (stray,) = ids_of(tokenizer(kind), "<0xE4>")
    ids = [*ids_of(tokenizer(kind), "😀"), stray, *ids_of(tokenizer(kind), "▁Paris")]
    assert "".join(deltas(kind, ids_of(tokenizer(kind), "▁is"), ids)) == "😀\ufffd Paris"


def test_nothing_before_the_text() -> None:
    """After special tokens alone the first word has no space: it begins the text. Later hidden
    tokens change nothing."""
    start, paris = ids_of(tokenizer("sentencepiece"), "<s>", "▁Paris")
    for prompt in ([], [start], [start, start]):
        assert "".join(deltas("sentencepiece", prompt, [paris, start, paris])) == "Paris Paris"


def test_no_space_is_tidied_away() -> None:
    """``clean_up_tokenization_spaces`` ate the space of " ." and of " n't"."""
    made = sentencepiece(cleanup=True)
    prompt, ids = ids_of(made, "▁is"), ids_of(made, "▁Paris", "▁.", "▁n't", "▁'s", "▁,")
    decoder = IncrementalDecoder(TokenPieces(made), prompt)
    assert "".join(map(decoder.put, ids)) == " Paris . n't 's ,"


def test_added_tokens_are_what_they_say() -> None:
    made = byte_level()
    made.add_tokens(["é!"])  # letters that stand for bytes in other tokens
    ids = [made.get_vocab()[name] for name in ("<tool>", "   ", "é!")]
    decoder = IncrementalDecoder(TokenPieces(made))
    assert "".join([*map(decoder.put, ids), decoder.finish()]) == "<tool>   é!"


def test_special_tokens_are_shown_where_asked() -> None:
    decoder = IncrementalDecoder(pieces("byte-level"), show_special=True)
    assert decoder.put(4) == "<|im_end|>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_the_same_at_any_place(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deciding on a stop string used to decode all tokens for each new one: 8 million for an answer
    of 4,000."""
    made, draw = tokenizer(kind), random.Random(0)
    ids = [draw.randrange(5, len(made)) for _ in range(4000)]
    real, decoded = made.decode, []

    def counting(asked: Any, **options: Any) -> str:
        decoded.append(len(asked))
        return real(asked, **options)

    monkeypatch.setattr(made, "decode", counting)
    decoder = IncrementalDecoder(TokenPieces(made), ids[:100])
    costs = []
    for token in ids:
        decoded.clear()
        decoder.put(token)
        costs.append(sum(decoded))
    assert max(costs) <= 4


def test_lines_of_all_scripts() -> None:
    for kind in ("byte-level", "no first space"):
        for line in LINES:
            ids = tokenizer(kind).encode(line, add_special_tokens=False)
            assert "".join(deltas(kind, [], ids)) == line
