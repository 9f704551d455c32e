"""Log-probabilities of the tokens of prompts, which ``echo`` with ``logprobs`` asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from flexgen_bench.engine.outputs import TokenLogprobs
from flexgen_bench.engine.sampling import likeliest

if TYPE_CHECKING:
    from torch import Tensor


class Scorer(Protocol):
    """What of an ``LLM`` is needed here."""

    def log_probabilities(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]: ...


def prompt_logprobs(
    scorer: Scorer, prompts: Sequence[Sequence[int]], counts: Sequence[int]
) -> list[list[TokenLogprobs | None]]:
    """For every token of each prompt, None for its first. counts: of each prompt, how many of the likeliest tokens."""
    distinct = list(dict.fromkeys(tuple(p) for p in prompts if len(p) > 1))
    most = {p: max(c for q, c in zip(prompts, counts, strict=True) if tuple(q) == p) for p in distinct}
    by_prompt: dict[tuple[int, ...], list[TokenLogprobs | None]] = {}
    for prompt, rows in zip(distinct, scorer.log_probabilities(distinct) if distinct else (), strict=True):
        scored = [likeliest(row, token, most[prompt]) for row, token in zip(rows, prompt[1:], strict=True)]
        by_prompt[prompt] = [None, *scored]
    results: list[list[TokenLogprobs | None]] = []
    for tokens, count in zip(prompts, counts, strict=True):
        own = by_prompt.get(tuple(tokens), [None])
        results.append([p and TokenLogprobs(p.logprob, p.top[:count]) for p in own])
    return results
