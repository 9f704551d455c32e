"""The tokens that a tokenizer puts around a text by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# To see what is added, a text of which the vocabulary knows something is needed.
_PROBES = ("a", "0", "the", "\n", " ")


@dataclass(frozen=True)
class AddedTokens:
    """Start tokens ``before`` every text and end tokens ``after`` it."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @staticmethod
    def of(tokenizer: Any) -> AddedTokens:
        """What a tokenizer of ``transformers`` adds to any text."""
        for probe in _PROBES:
            own = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
            all_ids = list(tokenizer(probe)["input_ids"])
            for place in range(len(all_ids) - len(own) + 1 if own else 0):
                if all_ids[place : place + len(own)] == own:
                    after = all_ids[place + len(own) :]
                    return AddedTokens(tuple(all_ids[:place]), tuple(after))
        return AddedTokens(tuple(tokenizer("")["input_ids"]), ())

    def open_ended(self, ids: Sequence[int]) -> list[int]:
        """``ids`` of a text, as the tokenizer gives them, as the beginning of a longer one.

        Without the end tokens, after which a model begins something else; and with one start where
        the text itself says it, too (the output of a chat template does).
        """
        stop = len(ids) - len(self.after)
        own = list(ids if tuple(ids[stop:]) != self.after else ids[:stop])
        size = len(self.before)
        twice = size > 0 and tuple(own[: 2 * size]) == 2 * self.before
        return own[size:] if twice else own
