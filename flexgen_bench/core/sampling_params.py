"""How tokens are chosen and when a sequence ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import Any

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.given import check_text, token_ids, whole_number

# The likeliest token alone, as with everything below it: that would be zero in float32, and keep no token at all.
_LEAST_TOP_P = 1e-30


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one prompt's continuation.

    max_tokens: most new tokens. temperature: 0 is greedy. top_k: 0 keeps all. top_p: 1 keeps all.
    repetition_penalty: above 1 discourages tokens seen in prompt or output. stop: strings that end
    the text (they are cut off); None: none. stop_token_ids: ids that end it, besides the model's
    own end-of-sequence id unless ignore_eos. seed: with the same seed and prompt position, the same
    tokens come out however prompts are batched. logprobs: how many of the likeliest tokens are
    reported with every new one, each with its log-probability before temperature and penalties
    (natural logarithm; 0: the new token's alone); None: none.

    Numbers may be numpy's or torch's. UserError names the field that has a value of another kind.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._integer("max_tokens", 1, "an integer of at least 1")
        self._number("temperature", "a finite number of at least 0 (0 is greedy)")
        self._integer("top_k", 0, "an integer of at least 0 (0 keeps all tokens)")
        self._number("top_p", "above 0 and at most 1", above_zero=True, most=1)
        object.__setattr__(self, "top_p", max(self.top_p, _LEAST_TOP_P))
        self._number("repetition_penalty", "a finite number above 0", above_zero=True)
        self._integer("seed", None, "an integer")
        if self.logprobs is not None:
            self._integer("logprobs", 0, "an integer of at least 0, or None")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        ids = token_ids(() if self.stop_token_ids is None else self.stop_token_ids, "stop_token_ids")
        if any(t < 0 for t in ids):
            raise UserError("stop_token_ids", self.stop_token_ids, "token ids of at least 0")
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        if not isinstance(self.ignore_eos, bool):
            raise UserError("ignore_eos", self.ignore_eos, "True or False")

    def _integer(self, name: str, least: int | None, allowed: str) -> None:
        value = whole_number(getattr(self, name))
        if value is None or (least is not None and value < least):
            raise UserError(name, getattr(self, name), allowed)
        object.__setattr__(self, name, value)

    def _number(self, name: str, allowed: str, *, above_zero: bool = False, most: float = inf) -> None:
        given = getattr(self, name)
        is_number = isinstance(given, Real) and not isinstance(given, bool)
        value = float(given) if is_number else -1.0
        if not 0 <= value <= most or value == inf or (above_zero and value == 0):
            raise UserError(name, given, allowed)
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, Sequence) or any(not isinstance(s, str) or not s for s in stop):
        raise UserError("stop", stop, "a string, or strings, that are not empty", "None or [] is for none.")
    for number, string in enumerate(stop):
        check_text(string, f"stop[{number}]")
    return tuple(stop)
