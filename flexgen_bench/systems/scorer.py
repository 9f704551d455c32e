"""What a system offers whose accuracy is to be judged: scores of given tokens, and answers to prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.outputs import Score
from flexgen_bench.schedule.prefix_tree import ScoreRequest

if TYPE_CHECKING:
    from torch import Tensor

# Given each result as soon as it is there, in any order: its place in what was asked, and the result.
OnScore = Callable[[int, Score], None]
OnTokens = Callable[[int, Sequence[int]], None]


class Scorer(ABC):
    """A loaded system, given token ids; text is somebody else's business. One call at a time."""

    @abstractmethod
    def score(self, requests: Sequence[ScoreRequest], on_score: OnScore) -> None:
        """Log-likelihoods of the tokens of each request from its ``start`` on."""

    @abstractmethod
    def log_probabilities(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Of each sequence of T tokens in turn, the log-probabilities (T-1, V) float32 after its first, second, ...
        token."""

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], on_tokens: OnTokens) -> None:
        """New tokens of each prompt, until its params or the model's end-of-sequence id end it."""

    def close(self) -> None:  # noqa: B027
        """Release everything."""
