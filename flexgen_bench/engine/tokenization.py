"""A checkpoint's own tokenizer: text to ids and back, stop strings, start and end of sequences."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.given import check_text, token_ids
from flexgen_bench.engine.added_tokens import AddedTokens
from flexgen_bench.engine.incremental_decoder import IncrementalDecoder
from flexgen_bench.engine.text_stream import TextStream
from flexgen_bench.engine.token_pieces import TokenPieces

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Text that something can follow without being joined to it into one token.
_BEFORE_ANYTHING = ("\n", "a", ".", "0")


class TextTokenizer:
    """The tokenizer in a checkpoint folder, loaded when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def encode(self, prompt: str | Sequence[int], field: str) -> list[int]:
        """Ids of a prompt that is to be continued: with the start tokens of the tokenizer, once,
        and without its end tokens.

        Of empty text: the model's start token. UserError for what is no text and no ids, and for
        text without a tokenizer.
        """
        if not isinstance(prompt, str):
            return token_ids(prompt, field)
        tokenizer = self._for_text(prompt, field)
        ids = self._added.open_ended(tokenizer(prompt)["input_ids"])
        return ids if ids or prompt else self._start(field)

    def encode_pair(
        self, context: str | Sequence[int], continuation: str | Sequence[int], index: int
    ) -> tuple[int, list[int]]:
        """Where the continuation starts, and the ids of both.

        Text is encoded as one, as lm-eval's own models do, so the continuation has the ids that
        follow the context's: spaces at the end of a context belong to it, since tokens carry their
        leading space. Where a token of both together would reach over the end of the context, each
        has ids of its own. An empty context is the model's start token.
        """
        field = f"continuations[{index}]"
        if isinstance(context, str) and isinstance(continuation, str):
            before, both = self._text_pair(context, continuation, index, field)
        else:
            before = self.encode(context, f"contexts[{index}]")
            own = self.encode(continuation, field)
            if isinstance(context, str) or isinstance(continuation, str):
                raise UserError(field, continuation, "of the same kind as its context: both text or both ids")
            before = before or self._start(f"contexts[{index}]")
            both = [*before, *own]
        if len(both) <= len(before):
            raise UserError(field, continuation, "at least one token long")
        return len(before), both

    def stream(self, prompt: Sequence[int], stop: Sequence[str] = ()) -> TextStream:
        """The text of an answer to these ids, as it appears. UserError for stop strings without a
        tokenizer."""
        if self._pieces is None:
            if stop:
                raise UserError("stop", stop, "empty", f"{self._folder} has no tokenizer to find text with.")
            return TextStream(None, {})
        return TextStream(IncrementalDecoder(self._pieces, prompt), self._pieces.special, stop)

    @property
    def of_transformers(self) -> Any:
        """The tokenizer of ``transformers`` behind this one; None for a folder without."""
        return self._loaded

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for inside a text, as UTF-8, of which it may hold a part of a character; special tokens
        as their names. Empty without a tokenizer, and for an id that the tokenizer does not know."""
        pieces = self._pieces
        if pieces is None or not pieces.is_known(token):
            return b""
        name = pieces.special.get(token)
        return pieces.after(0, token) if name is None else name.encode()

    def text_after(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """``ids`` as text that goes on after ``prompt``, special tokens shown; empty without a
        tokenizer."""
        if self._pieces is None:
            return ""
        decoder = IncrementalDecoder(self._pieces, prompt, show_special=True)
        return "".join([*map(decoder.put, ids), decoder.finish()])

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """End-of-sequence ids: what the checkpoint says for generation, else for the model, else the tokenizer's.

        StoreError for an entry that is no id, which would never end anything.
        """
        for name in ("generation_config.json", "config.json"):
            entry = _json(self._folder / name).get("eos_token_id")
            if entry is None:
                continue
            ids = entry if isinstance(entry, list) else [entry]
            if any(type(each) is not int for each in ids):
                raise StoreError(
                    f"{self._folder / name}: eos_token_id is {entry!r}; "
                    "it must be an integer, a list of integers, or null."
                )
            return frozenset(ids)
        own = None if self._loaded is None else self._loaded.eos_token_id
        return frozenset() if own is None else frozenset([own])

    def _text_pair(self, context: str, continuation: str, index: int, field: str) -> tuple[list[int], list[int]]:
        """Ids of the context, and of both."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        self._for_text(continuation, field)
        before = self.encode(context, f"contexts[{index}]") if context else []
        if not before:
            before, own = self._start(f"contexts[{index}]"), self._plain(continuation, field)
            says_it = own[: len(before)] == before
            return before, own if says_it else [*before, *own]
        both = self.encode(context + continuation, field)
        if both[: len(before)] != before:
            both = [*before, *self._inside(continuation, field)]
        return before, both

    def _plain(self, text: str, field: str) -> list[int]:
        tokenizer = self._for_text(text, field)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _inside(self, text: str, field: str) -> list[int]:
        """Ids of text that something stands before: sentencepiece begins other text with a space of
        its own."""
        for before in _BEFORE_ANYTHING:
            ids, both = self._plain(before, field), self._plain(before + text, field)
            if both[: len(ids)] == ids:
                return both[len(ids) :]
        raise UserError(
            field,
            text,
            "text that begins where a token begins",
            "Its tokens reach over the end of the context: give both as token ids.",
        )

    def _for_text(self, text: str, field: str) -> Any:
        """The tokenizer, for text that it can take."""
        if self._loaded is None:
            raise UserError(field, text, "token ids", f"{self._folder} has no tokenizer, so text cannot be read.")
        check_text(text, field)
        return self._loaded

    def _start(self, field: str) -> list[int]:
        """What stands before text that nothing stands before: what the tokenizer puts there, else
        the start token, else the end token of tokenizer or model (as in lm-eval)."""
        if self._loaded is not None and self._added.before:
            return list(self._added.before)
        config = _json(self._folder / "config.json")
        for name in ("bos_token_id", "eos_token_id"):
            for token in (getattr(self._loaded, name, None), config.get(name)):
                if type(token) is int:
                    return [token]
        raise UserError(
            field,
            "",
            "at least one token long",
            "Nothing stands before it, and neither the tokenizer nor config.json names a start token (bos_token_id).",
        )

    @cached_property
    def _loaded(self) -> Any:
        return load_tokenizer(self._folder) if has_tokenizer(self._folder) else None

    @cached_property
    def _added(self) -> AddedTokens:
        return AddedTokens.of(self._loaded)

    @cached_property
    def _pieces(self) -> TokenPieces | None:
        return None if self._loaded is None else TokenPieces(self._loaded)


def has_tokenizer(folder: Path) -> bool:
    """Whether the files are there that hold a tokenizer's vocabulary."""
    return any((folder / name).exists() for name in _VOCABULARIES)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint folder; StoreError if it cannot be loaded. Code in the folder is never run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged or foreign file makes the library raise
        first = str(error).strip().splitlines()
        raise StoreError(
            f"the tokenizer in {folder} cannot be loaded: {first[0] if first else type(error).__name__}"
            + _without_sentencepiece(folder)
        ) from error


def _without_sentencepiece(folder: Path) -> str:
    """What to do where a sentencepiece model stands alone and its package is missing: transformers then takes the file
    for one of another kind, and says so."""
    alone = (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists()
    if not alone or find_spec("sentencepiece") is not None:
        return ""
    return (
        ". If tokenizer.model is one of sentencepiece, as Llama 2 has it: pip install sentencepiece protobuf, "
        "or add the tokenizer.json that is published with it."
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StoreError(f"{path} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}
