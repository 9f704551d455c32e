"""What the library is asked for and what it answers: prompts, outputs, scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.given import as_list, token_ids, whole_number
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.schedule.prefix_tree import ScoreRequest

Prompt = str | Sequence[int]


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue. stream: which random stream of its seed it samples from; several answers to one prompt
    have different ones."""

    prompt: Prompt
    params: SamplingParams = field(default_factory=SamplingParams)
    stream: int = 0


@dataclass(frozen=True)
class TokenLogprobs:
    """Of one new token: its log-probability, and the likeliest tokens with theirs, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """One prompt's result.

    text: what the tokens add to the prompt's text, so that prompt + text is the whole of it: from
    the space before the first word on, without special tokens, and cut before the first stop
    string. finish_reason: "stop" (a stop id or string) or "length". logprobs: one entry a token
    where ``SamplingParams.logprobs`` asks for them.
    """

    prompt: Prompt
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True)
class Piece:
    """What is new in one answer after a pass: its tokens, and its text as far as that is sure. ``finish_reason`` is
    empty but for the last."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Score:
    """Log-likelihood of one continuation given its context: natural logarithm, summed and per token."""

    logprob: float
    is_greedy: bool
    token_logprobs: tuple[float, ...]


def prompts_of(prompts: Any) -> list[str | list[int]]:
    """Each a text or a list of ids: of a single prompt, or of a list of prompts in any mixture.
    UserError names the first that is neither."""
    if isinstance(prompts, str):
        return [prompts]
    given = as_list(prompts, "prompts", "a text, a list of token ids, or a list of these")
    if not given:
        raise UserError("prompts", given, "at least one prompt")
    if isinstance(given[0], bool) or whole_number(given[0]) is not None:  # ids of one prompt
        return [token_ids(given, "prompts[0]")]
    return [
        str(prompt) if isinstance(prompt, str) else token_ids(prompt, f"prompts[{index}]")
        for index, prompt in enumerate(given)
    ]


def pairs_of(contexts: Any, continuations: Any) -> list[tuple[Any, Any]]:
    """Each context with its continuation. UserError for what are no two lists of one length."""
    expected = "a list of texts, or of lists of token ids"
    for name, given in (("contexts", contexts), ("continuations", continuations)):
        if isinstance(given, str):
            raise UserError(name, given, expected, "Put a single one into a list.")
    before = as_list(contexts, "contexts", expected)
    after = as_list(continuations, "continuations", expected)
    if len(before) != len(after):
        raise UserError("continuations", len(after), f"as many as contexts ({len(before)})")
    if not before:
        raise UserError("contexts", before, "at least one context")
    return list(zip(before, after, strict=True))


def requests_of_ids(requests: Any) -> list[ScoreRequest]:
    """Requests whose tokens are lists of ints. UserError names the first that is none."""
    score_requests = []
    for index, request in enumerate(as_list(requests, "requests", "a list of ScoreRequest")):
        name = f"requests[{index}]"
        if not isinstance(request, ScoreRequest):
            raise UserError(name, request, "a ScoreRequest(tokens, start)")
        start = whole_number(request.start)
        if start is None:
            raise UserError(f"{name}.start", request.start, "an integer")
        score_requests.append(ScoreRequest(token_ids(request.tokens, f"{name}.tokens"), start))
    return score_requests


def per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
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
