"""A model's tokenizer as lm-eval wants it used, and what is refused: none, or one that loses text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.given import check_text
from flexgen_bench.engine.added_tokens import AddedTokens
from flexgen_bench.engine.incremental_decoder import IncrementalDecoder
from flexgen_bench.engine.token_pieces import TokenPieces
from flexgen_bench.engine.tokenization import has_tokenizer, load_tokenizer

# Letters of both cases, digits, punctuation, white space inside and letters beyond ASCII: what every task's text has.
PROBE = 'Question: Is 12 + 30 = 42?\n\nAnswer: yes, it isn\'t "No" (café, 50%).'


class TaskText:
    """Text to token ids and back, by the rules of lm-eval's own ``hf`` model, so that equal tasks give equal tokens.

    Raises UserError for a model without a tokenizer, or with one whose ids do not lead back to the text.
    """

    def __init__(self, folder: Path, vocab_size: int) -> None:
        if not has_tokenizer(folder):
            raise UserError(
                "model",
                str(folder),
                "a model with a tokenizer (tokenizer.json, tokenizer.model or vocab.json)",
                "Tasks are text; put the tokenizer's files into the folder.",
            )
        self.tokenizer = load_tokenizer(folder)
        self._added, self._pieces = AddedTokens.of(self.tokenizer), TokenPieces(self.tokenizer)
        self._check(folder, vocab_size)

    def _check(self, folder: Path, vocab_size: int) -> None:
        ids = self.encode(PROBE, special=False)
        # A leading space is what sentencepiece puts before the first word.
        back = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).removeprefix(
            " "
        )
        if back != PROBE:
            raise UserError(
                "tokenizer",
                f"{folder}: {PROBE!r} comes back as {back!r}",
                "one that gives back the text it was given",
                "Scores of changed text mean nothing.",
            )
        beyond = [i for i in [*ids, *self._special_ids()] if i >= vocab_size]
        if beyond:
            raise UserError(
                "tokenizer",
                f"{folder}: ids {beyond[:5]}",
                f"below the model's vocabulary of {vocab_size}",
                "This tokenizer belongs to another model.",
            )

    def _special_ids(self) -> list[int]:
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return [i for i in ids if i is not None]

    @property
    def start_id(self) -> int:
        """What stands before text that nothing stands before: begin of sequence, else end of sequence."""
        if not self._special_ids():
            raise UserError(
                "tokenizer",
                "no bos_token and no eos_token",
                "one with either of them",
                "Text without a context needs a token before it.",
            )
        return self._special_ids()[0]

    @property
    def end_text(self) -> str | None:
        """The end-of-sequence token as text."""
        end = self.tokenizer.eos_token_id
        return None if end is None else str(self.tokenizer.decode(end, skip_special_tokens=False))

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """special: whether to add special tokens. None: those that the tokenizer puts before a text, but for text that
        begins with them already. Its end tokens are left out, other than in lm-eval: it would score them in place of a
        continuation's last words. UserError for what is no text."""
        check_text(text, "text")
        if special is None:
            return self._added.open_ended(self.tokenizer.encode(text))
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=special)]

    def answer(self, prompt: Sequence[int], ids: Sequence[int], stop: list[str]) -> str:
        """What lm-eval shows of an answer: decoded by itself, so without the space of sentencepiece's first word, and
        cut before the first stop string. That space counts as its beginning, as it did when the answer was ended."""
        from lm_eval.models.utils import postprocess_generated_text

        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        decoder = IncrementalDecoder(self._pieces, prompt)
        in_context = "".join([*map(decoder.put, ids), decoder.finish()])
        space = " " if in_context.startswith(" ") and not text.startswith(" ") else ""
        return str(postprocess_generated_text(space + text, stop, None)).removeprefix(space)
