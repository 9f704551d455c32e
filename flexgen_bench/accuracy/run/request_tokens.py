"""One request of lm-eval as tokens. What cannot be scored is a UserError about this one, so that it does not take the
others with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from flexgen_bench.accuracy.run.text import TaskText
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.given import check_text
from flexgen_bench.schedule.prefix_tree import ScoreRequest

# lm-eval's own: context and continuation, together and then apart.
EncodePair = Callable[[str, str], tuple[list[int], list[int]]]


@dataclass(frozen=True)
class RequestTokens:
    """text: the model's tokenizer. max_length: tokens that it sees at once. encode_pair: of a context that is not
    empty.

    Each method also tells whether something was cut from the left. They raise UserError for text that is none (a lone
    surrogate), and for what does not leave a token to score, or has too many to be scored as a whole.
    """

    text: TaskText
    max_length: int
    encode_pair: EncodePair

    def pair(self, context: str, continuation: str) -> tuple[ScoreRequest, bool]:
        """A continuation after its context; without one, after the start token, which then is not scored itself."""
        check_text(context, "context")
        check_text(continuation, "continuation")
        if context:
            return self.request(*self.encode_pair(context, continuation))
        start, after = self.text.start_id, self.text.encode(continuation, special=False)
        if after[:1] == [start]:
            after = after[1:]
        return self.request([start], after)

    def request(self, before: list[int], after: list[int]) -> tuple[ScoreRequest, bool]:
        """Cut from the left where it is too long: the last token is not computed, so one more than the model's
        positions fits."""
        if not 1 <= len(after) <= self.max_length:
            raise UserError(
                "continuation",
                f"{len(after)} tokens",
                f"from 1 to {self.max_length} tokens long",
                "It cannot be scored as a whole." if after else "No token is left of it.",
            )
        tokens = before + after
        kept = tokens[-(self.max_length + 1) :]
        return ScoreRequest(kept, len(kept) - len(after)), len(kept) < len(tokens)

    def windows(self, text: str) -> list[ScoreRequest]:
        """A whole text: each token is predicted once, from as much as the model can see."""
        token_windows = get_rolling_token_windows(
            self.text.encode(text), self.text.start_id, self.max_length, context_len=1
        )
        return [self.request(*make_disjoint_window(window))[0] for window in token_windows]

    def prompt(self, context: str, new_tokens: int) -> tuple[list[int], bool]:
        """A prompt that leaves room for so many new tokens."""
        most = self.max_length - new_tokens
        if most < 1:
            raise UserError(
                "max_gen_toks",
                new_tokens,
                f"below the {self.max_length} positions there are",
                "Nothing is left for the prompt.",
            )
        tokens = self.text.encode(context) or [self.text.start_id]
        return tokens[-most:], len(tokens) > most
