"""What the library is asked for and what it answers: prompts, outputs, scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.sampling_params import SamplingParams

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Output:
    """One prompt's result. ``finish_reason``: "stop" (a stop id or string) or "length"."""

    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Score:
    """Log-likelihood of one continuation given its context: natural logarithm, summed and per token."""

    logprob: float
    is_greedy: bool
    token_logprobs: tuple[float, ...]


def is_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    """A single text, or a single list of token ids. UserError for what is neither nor a list of them."""
    if not isinstance(prompts, str | Sequence):
        raise UserError("prompts", prompts, "a text, a list of token ids, or a list of these")
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))


def per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    """One for each of ``count`` prompts. UserError for a wrong number of them."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, Sequence) or any(not isinstance(p, SamplingParams) for p in params):
        raise UserError("sampling_params", params, "SamplingParams, or a list of them")
    if len(params) != count:
        raise UserError("sampling_params", len(params), f"one, or as many as prompts ({count})")
    return params


def score_of(tokens: Sequence[tuple[float, bool]]) -> Score:
    """Of the scored tokens: (log-probability, is the largest) each."""
    logprobs = tuple(logprob for logprob, _ in tokens)
    return Score(sum(logprobs), all(greedy for _, greedy in tokens), logprobs)
