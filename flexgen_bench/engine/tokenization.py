"""A checkpoint's own tokenizer: text to ids and back, stop strings, end-of-sequence ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import StoreError, UserError

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class TextTokenizer:
    """The tokenizer in a checkpoint folder, loaded when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def encode(self, prompt: str | Sequence[int], field: str) -> list[int]:
        """Ids of a prompt, with the tokenizer's own special tokens. UserError if text comes without a tokenizer."""
        if not isinstance(prompt, str):
            return _token_ids(prompt, field)
        if self._loaded is None:
            raise UserError(
                field,
                prompt,
                "token ids",
                f"{self._folder} has no tokenizer, so text cannot be read.",
            )
        return list(self._loaded(prompt)["input_ids"])

    def encode_pair(
        self, context: str | Sequence[int], continuation: str | Sequence[int], index: int
    ) -> tuple[int, list[int]]:
        """Where the continuation starts, and the ids of both. Spaces at the end of a context belong to the
        continuation, since tokens carry their leading space."""
        field = f"continuations[{index}]"
        if isinstance(context, str) != isinstance(continuation, str):
            raise UserError(
                field, continuation, "of the same kind as its context: both text or both ids"
            )
        if isinstance(context, str) and isinstance(continuation, str):
            spaces = len(context) - len(context.rstrip())
            if spaces:
                context, continuation = context[:-spaces], context[-spaces:] + continuation
            before = self.encode(context, f"contexts[{index}]") if context else []
            if before:
                both = self.encode(context + continuation, field)
            else:
                both = self._plain(continuation, field)
        else:
            before = self.encode(context, f"contexts[{index}]")
            both = [*before, *self.encode(continuation, field)]
        if not before:
            start = self._start_id(field)
            before, both = [start], [start, *both]
        if len(both) <= len(before):
            raise UserError(field, continuation, "at least one token long")
        return len(before), both

    def text(self, ids: Sequence[int], stop: tuple[str, ...]) -> str:
        """Ids as text without special tokens, cut before the first stop string; empty without a tokenizer."""
        if self._loaded is None:
            return ""
        text = str(self._loaded.decode(list(ids), skip_special_tokens=True))
        cuts = [place for s in stop if (place := text.find(s)) >= 0]
        return text[: min(cuts)] if cuts else text

    def stop_test(self, stop: tuple[str, ...]) -> Callable[[list[int]], bool]:
        """Whether the new tokens' text holds a stop string."""
        if not stop:
            return lambda new: False
        tokenizer = self._loaded
        if tokenizer is None:
            raise UserError(
                "stop", stop, "empty", f"{self._folder} has no tokenizer to find text with."
            )
        return lambda new: any(s in tokenizer.decode(new, skip_special_tokens=True) for s in stop)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """End-of-sequence ids: what the checkpoint says for generation, else for the model, else the tokenizer's."""
        for name in ("generation_config.json", "config.json"):
            found = _json(self._folder / name).get("eos_token_id")
            if found is not None:
                return frozenset(found if isinstance(found, list) else [found])
        own = None if self._loaded is None else self._loaded.eos_token_id
        return frozenset() if own is None else frozenset([own])

    def _plain(self, text: str, field: str) -> list[int]:
        self.encode(text, field)  # the same refusal without a tokenizer
        return list(self._loaded(text, add_special_tokens=False)["input_ids"])

    def _start_id(self, field: str) -> int:
        for key in ("bos_token_id", "eos_token_id"):
            found = _json(self._folder / "config.json").get(key)
            if isinstance(found, int):
                return found
        raise UserError(
            field, "", "after a context that is not empty", "The model names no start token."
        )

    @cached_property
    def _loaded(self) -> Any:
        return load_tokenizer(self._folder) if has_tokenizer(self._folder) else None


def _token_ids(prompt: Any, field: str) -> list[int]:
    if not isinstance(prompt, Sequence):
        raise UserError(field, prompt, "text, or a list of token ids")
    wrong = [t for t in prompt if type(t) is not int]
    if wrong:
        raise UserError(field, wrong[:5], "text, or token ids as integers")
    return list(prompt)


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
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StoreError(f"{path} is not valid JSON: {error}") from error
    return found if isinstance(found, dict) else {}
