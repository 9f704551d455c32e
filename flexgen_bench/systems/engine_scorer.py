"""The engine as a scorer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.llm.llm import LLM
from flexgen_bench.schedule.prefix_tree import ScoreRequest
from flexgen_bench.systems.scorer import OnScore, OnTokens, Scorer

if TYPE_CHECKING:
    from torch import Tensor


class EngineScorer(Scorer):
    """Every call is a job of the engine, batched by its own scheduler."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def score(self, requests: Sequence[ScoreRequest], on_score: OnScore) -> None:
        self._llm.score_tokens(requests, on_score)

    def log_probabilities(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        return self._llm.log_probabilities(sequences)

    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], on_tokens: OnTokens) -> None:
        self._llm.generate(prompts, params, lambda index, output: on_tokens(index, output.token_ids))

    def close(self) -> None:
        self._llm.close()
