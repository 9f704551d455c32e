"""Text from tokens that come one at a time, in the context of the prompt. The cost of a token does
not grow with their number."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_bench.engine.token_pieces import REPLACEMENT, TokenPieces

# As many last tokens of a prompt decide how text goes on: an incomplete character has at most three
# bytes.
_CONTEXT = 4


class IncrementalDecoder:
    """Gives the text that each new token adds.

    All that ``put`` and ``finish`` return, joined, is what the tokens add to the prompt's text:
    with the space before the first word, without special tokens (or with them, ``show_special``),
    nothing tidied up. A character whose bytes come in several tokens is returned with the last of
    them; bytes that are part of no character become U+FFFD.
    """

    def __init__(self, pieces: TokenPieces, prompt: Sequence[int] = (), show_special: bool = False) -> None:
        self._pieces, self._show_special = pieces, show_special
        self._utf8 = pieces.utf8()
        self._previous: int | None = None  # the last token of the text so far
        self._foreign = 0
        for token in self._end_of(prompt):
            self.put(token)
        incomplete = self._utf8.getstate()[0]
        # The marks of the prompt's own incomplete character, if the new tokens do not complete it,
        # are no new text.
        self._foreign = pieces.marks(incomplete) if incomplete else 0

    def put(self, token: int) -> str:
        """The text that is complete with this token."""
        if token in self._pieces.special:
            return self._pieces.special[token] if self._show_special else ""
        if not self._pieces.is_known(token):
            return ""
        data = self._pieces.after(self._previous, token)
        self._previous = token
        return self._own(self._utf8.decode(data))

    def finish(self) -> str:
        """What is still incomplete, marked with U+FFFD."""
        return self._own(self._utf8.decode(b"", True))

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        tokens: list[int] = []
        for token in reversed(prompt):
            if token not in self._pieces.special and self._pieces.is_known(token):
                tokens.append(token)
            if len(tokens) == _CONTEXT:
                break
        return tokens[::-1]

    def _own(self, text: str) -> str:
        if not text or not self._foreign:
            return text
        marks = len(text) - len(text.lstrip(REPLACEMENT))
        own = text[min(marks, self._foreign) :]
        self._foreign = 0
        return own
