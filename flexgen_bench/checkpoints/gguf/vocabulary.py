"""The vocabulary of a GGUF file: tokens, what kind each is, which of them start and end a text.

As llama.cpp reads it (src/llama-vocab.cpp), which knows many tokens by their text, since files seldom say all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from flexgen_bench.checkpoints.gguf.header import GGUFHeader
from flexgen_bench.core.errors import StoreError

PREFIX = "tokenizer.ggml."


class TokenKind(IntEnum):
    """``tokenizer.ggml.token_type``."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Texts of tokens after which nothing is generated any more.
_END_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
        "<|ifm|im_end|>",
    }
)
# Tokens of infilling; the first three groups only become control tokens, the others end a generation, too.
_INFILL_TEXTS = frozenset(
    {
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
        "<|prefix|>",
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
        "<|suffix|>",
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
        "<|middle|>",
    }
)
_INFILL_ENDS: Mapping[str, frozenset[str]] = {
    "fim_pad_token_id": frozenset({"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"}),
    "fim_rep_token_id": frozenset({"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"}),
    "fim_sep_token_id": frozenset({"<|file_sep|>"}),
}
# Shown, whatever the file says (gpt-oss).
_VISIBLE_TEXTS = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id. ends: ids that end a generation, the file's own end token first. unknown, pad: None if there is
    none."""

    tokens: tuple[str, ...]
    kinds: tuple[TokenKind, ...]
    scores: tuple[float, ...]
    bos: int | None
    eos: int | None
    unknown: int | None
    pad: int | None
    ends: tuple[int, ...]


def read_vocabulary(header: GGUFHeader, defaults: Mapping[str, int]) -> Vocabulary:
    """The vocabulary in a file. defaults: ids by key, for what the file does not say. StoreError for a damaged one."""
    tokens = _tokens(header)
    kinds = _kinds(header, len(tokens))
    by_text = {text: number for number, text in enumerate(tokens)}

    def special(key: str) -> int | None:
        token_id = header.metadata.get(PREFIX + key)
        # Converters write -1, as an unsigned number, for a token that there is not.
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            return token_id
        default = defaults.get(key)
        return default if default is not None and default < len(tokens) else None

    ends = [number for key in _END_KEYS if (number := special(key)) is not None]
    for text in sorted(_END_TEXTS & by_text.keys(), key=by_text.__getitem__):
        ends.append(by_text[text])
        kinds[by_text[text]] = TokenKind.CONTROL
    for key, texts in _INFILL_ENDS.items():
        number = special(key)
        if number is None:
            numbers = sorted(by_text[text] for text in texts & by_text.keys())
            for each in numbers:
                kinds[each] = TokenKind.CONTROL
            ends += numbers
        else:
            ends.append(number)
    for text in _INFILL_TEXTS & by_text.keys():
        kinds[by_text[text]] = TokenKind.CONTROL
    for text in _VISIBLE_TEXTS & by_text.keys():
        kinds[by_text[text]] = TokenKind.USER_DEFINED
    _not_ends(ends, kinds, by_text)
    return Vocabulary(
        tokens=tuple(tokens),
        kinds=tuple(kinds),
        scores=_scores(header, len(tokens)),
        bos=special("bos_token_id"),
        eos=special("eos_token_id"),
        unknown=special("unknown_token_id"),
        pad=special("padding_token_id"),
        ends=tuple(dict.fromkeys(ends)),
    )


def flag(header: GGUFHeader, key: str, default: bool) -> bool:
    """A yes or no of the tokenizer's namespace."""
    value = header.metadata.get(PREFIX + key, default)
    if not isinstance(value, bool):
        raise StoreError(f"{header.path}: {PREFIX}{key} is {value!r}; true or false can be read.")
    return value


def strings(header: GGUFHeader, key: str) -> list[str]:
    """A list of texts that must be there."""
    texts = header.metadata.get(PREFIX + key)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise StoreError(f"{header.path} has no {PREFIX}{key}, so its text cannot be read. Convert it again.")
    return texts


def _tokens(header: GGUFHeader) -> list[str]:
    tokens = [text or f"[EMPTY_{n}]" for n, text in enumerate(strings(header, "tokens"))]
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(text for text in tokens if text in seen or seen.add(text))  # type: ignore[func-returns-value]
        raise StoreError(f"{header.path}: token {twice!r} is in the vocabulary twice.")
    return tokens


def _kinds(header: GGUFHeader, count: int) -> list[TokenKind]:
    numbers = _numbers(header, "token_type", count)
    known = {kind.value for kind in TokenKind}
    if numbers is None:
        return [TokenKind.NORMAL] * count
    return [TokenKind(n) if n in known else TokenKind.UNDEFINED for n in numbers]


def _scores(header: GGUFHeader, count: int) -> tuple[float, ...]:
    return tuple(float(n) for n in _numbers(header, "scores", count) or [0.0] * count)


def _numbers(header: GGUFHeader, key: str, count: int) -> list[Any] | None:
    numbers = header.metadata.get(PREFIX + key)
    if numbers is None:
        return None
    if not isinstance(numbers, list) or len(numbers) < count or isinstance(numbers[0], str):
        raise StoreError(f"{header.path}: {PREFIX}{key} does not hold a number for each of {count} tokens.")
    return numbers[:count]


def _not_ends(ends: list[int], kinds: list[TokenKind], by_text: Mapping[str, int]) -> None:
    """Tokens that look like an end and are none beside certain others (gpt-oss and solar-open; gemma 4)."""
    listed = {text for text, number in by_text.items() if number in ends}
    calls = not listed.isdisjoint({"<|call|>", "<|calls|>"})
    if "<|end|>" in listed and calls and not listed.isdisjoint({"<|return|>", "<|flush|>"}):
        _drop(ends, by_text["<|end|>"])
        kinds[by_text["<|end|>"]] = TokenKind.USER_DEFINED
    if {"<|tool_response>", "</s>"} <= listed:
        _drop(ends, by_text["</s>"])
        kinds[by_text["</s>"]] = TokenKind.NORMAL


def _drop(ends: list[int], number: int) -> None:
    ends[:] = [each for each in ends if each != number]
