"""How tokens are chosen and when a sequence ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_bench.core.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one prompt's continuation.

    max_tokens: most new tokens. temperature: 0 is greedy. top_k: 0 keeps all. top_p: 1 keeps all.
    repetition_penalty: above 1 discourages tokens seen in prompt or output. stop: strings that end the text (they
    are cut off). stop_token_ids: ids that end it, besides the model's own end-of-sequence id unless ignore_eos.
    seed: with the same seed and prompt position, the same tokens come out however prompts are batched.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._at_least_one("max_tokens", self.max_tokens)
        if not (isinstance(self.temperature, int | float) and 0 <= self.temperature < float("inf")):
            raise UserError(
                "temperature", self.temperature, "a finite number of at least 0 (0 is greedy)"
            )
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise UserError("top_k", self.top_k, "an integer of at least 0 (0 keeps all tokens)")
        if not (isinstance(self.top_p, int | float) and 0 < self.top_p <= 1):
            raise UserError("top_p", self.top_p, "above 0 and at most 1")
        if not (
            isinstance(self.repetition_penalty, int | float)
            and 0 < self.repetition_penalty < float("inf")
        ):
            raise UserError(
                "repetition_penalty", self.repetition_penalty, "a finite number above 0"
            )
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise UserError("stop", self.stop, "strings that are not empty")
        if any(not isinstance(t, int) or t < 0 for t in self.stop_token_ids):
            raise UserError("stop_token_ids", self.stop_token_ids, "token ids of at least 0")
        if not isinstance(self.seed, int):
            raise UserError("seed", self.seed, "an integer")

    @staticmethod
    def _at_least_one(name: str, value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(name, value, "an integer of at least 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0
