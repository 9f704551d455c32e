"""A model's tokenizer as lm-eval wants it used, and what is refused: none, or one that loses text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flexgen_bench.core.errors import UserError
from flexgen_bench.engine.tokenization import has_tokenizer, load_tokenizer

# Letters of both cases, digits, punctuation, white space inside and letters beyond ASCII: what every task's text has.
PROBE = 'Question: Is 12 + 30 = 42?\n\nAnswer: yes, it isn\'t "No" (café, 50%).'


def check_text(text: object) -> None:
    """Raises UserError for what no tokenizer takes, without the text itself: it may be a line of somebody's data."""
    if not isinstance(text, str):
        raise UserError("text", type(text).__name__, "text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise UserError("text", found, "without halves of surrogate pairs") from error


class TaskText:
    """Text to token ids and back, by the rules of lm-eval's own ``hf`` model, so that equal tasks give equal tokens.

    Raises UserError for a model without a tokenizer, or with one whose ids do not lead back to the text.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        if not has_tokenizer(folder):
            raise UserError(
                "model", str(folder), "a model with a tokenizer (tokenizer.json, tokenizer.model or vocab.json)",
                "Tasks are text; put the tokenizer's files into the folder.",
            )  # fmt: skip
        self.tokenizer = load_tokenizer(folder)
        self._check(folder, vocab_size)

    def _check(self, folder: Path, vocab_size: int) -> None:
        ids = self.encode(PROBE, special=False)
        # A leading space is what sentencepiece puts before the first word.
        back = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        ).removeprefix(" ")
        if back != PROBE:
            raise UserError(
                "tokenizer", f"{folder}: {PROBE!r} comes back as {back!r}",
                "one that gives back the text it was given", "Scores of changed text mean nothing.",
            )  # fmt: skip
        beyond = [i for i in [*ids, *self._special_ids()] if i >= vocab_size]
        if beyond:
            raise UserError(
                "tokenizer", f"{folder}: ids {beyond[:5]}", f"below the model's vocabulary of {vocab_size}",
                "This tokenizer belongs to another model.",
            )  # fmt: skip

    def _special_ids(self) -> list[int]:
        found = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return [i for i in found if i is not None]

    @property
    def start_id(self) -> int:
        """What stands before text that nothing stands before: begin of sequence, else end of sequence."""
        if not self._special_ids():
            raise UserError(
                "tokenizer", "no bos_token and no eos_token", "one with either of them",
                "Text without a context needs a token before it.",
            )  # fmt: skip
        return self._special_ids()[0]

    @property
    def end_text(self) -> str | None:
        """The end-of-sequence token as text."""
        end = self.tokenizer.eos_token_id
        return None if end is None else str(self.tokenizer.decode(end, skip_special_tokens=False))

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """special: whether to add special tokens; None is the tokenizer's own habit, but none for text that begins with one already.

        Raises UserError for what is no text (``check_text``).
        """
        check_text(text)
        if special is None and self._special_ids():
            start = self.tokenizer.decode(self.start_id)
            if start and text.startswith(start):
                special = False
        options = {} if special is None else {"add_special_tokens": special}
        return [int(i) for i in self.tokenizer.encode(text, **options)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
