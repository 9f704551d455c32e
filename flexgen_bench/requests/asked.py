"""A request as the engine takes it: prompts as tokens, and what its answer is to look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.checks import check_prompt
from flexgen_bench.engine.outputs import GenerationRequest
from flexgen_bench.engine.tokenization import TextTokenizer
from flexgen_bench.requests.chat_template import encode_chat
from flexgen_bench.requests.errors import NOT_FOUND, RequestError, of_user_error, of_validation
from flexgen_bench.requests.forms import FORMS, MOST_CHOICES, ChatForm, CompletionForm, Form

DEFAULT_MAX_TOKENS = 16  # of completions, as in OpenAI's API


@dataclass(frozen=True)
class Limits:
    """Most tokens of a prompt, and of an answer; choices: most answers that one request may ask for. unstated_tokens:
    what an answer of a conversation may have that states none; None: as many as any."""

    prompt_tokens: int
    answer_tokens: int
    choices: int = MOST_CHOICES
    unstated_tokens: int | None = None


@dataclass(frozen=True)
class ParsedRequest:
    """sequences: what is to be generated, ``n`` for each prompt in turn; with ``max_tokens`` = 0 nothing is, and their
    prompts are scored. logprobs: how many of the likeliest tokens are reported, None: no log-probabilities. echo: the
    prompt is part of the answer."""

    is_chat: bool
    model: str
    sequences: tuple[GenerationRequest, ...]
    num_prompts: int
    logprobs: int | None = None
    echo: bool = False
    generates: bool = True
    streams: bool = False
    include_usage: bool = False

    @property
    def prompts(self) -> list[list[int]]:
        """Tokens of each choice's prompt."""
        return [list(sequence.prompt) for sequence in self.sequences]  # type: ignore[arg-type]

    @property
    def scores_prompt(self) -> bool:
        """Whether the answer holds log-probabilities of the prompt's own tokens."""
        return self.echo and self.logprobs is not None


class Reader:
    """From JSON bodies to what is asked of one model.

    names: by which the model may be asked for. Everything that is wrong with a body is a ``RequestError``.
    """

    def __init__(self, tokenizer: TextTokenizer, shape: ModelShape, names: Sequence[str], limits: Limits) -> None:
        self._tokenizer, self._shape, self._names, self._limits = tokenizer, shape, tuple(names), limits

    def read(self, url: str, body: Any, seed: int = 0) -> ParsedRequest:
        """seed: of a request that states none."""
        if url not in FORMS:
            raise RequestError(f"url = {url!r}: must be one of {', '.join(FORMS)}.", "url", "invalid_url", NOT_FOUND)
        if not isinstance(body, Mapping):
            raise RequestError("The body must be a JSON object.", "body", "invalid_value")
        try:
            form = FORMS[url].model_validate(body)
        except ValidationError as error:
            raise of_validation(error) from error
        if form.model not in self._names:
            message = f"model = {form.model!r} is not here; there is {', '.join(map(repr, self._names))}."
            raise RequestError(message, "model", "model_not_found", NOT_FOUND)
        if isinstance(form, ChatForm):
            return self._chat(form, seed)
        return self._completion(form, seed)

    def _chat(self, form: ChatForm, seed: int) -> ParsedRequest:
        with_logprobs = (form.top_logprobs or 0) if form.logprobs else None
        try:
            ids = encode_chat(self._tokenizer, form.messages)
        except UserError as error:
            raise of_user_error(error) from error
        stated = form.max_completion_tokens or form.max_tokens
        unstated = self._limits.answer_tokens if self._limits.unstated_tokens is None else self._limits.unstated_tokens
        return ParsedRequest(
            is_chat=True,
            model=form.model,
            sequences=self._sequences(form, "messages", [ids], stated, unstated, seed, with_logprobs),
            num_prompts=1,
            logprobs=with_logprobs,
            streams=bool(form.stream),
            include_usage=form.stream_options is not None and form.stream_options.include_usage,
        )

    def _completion(self, form: CompletionForm, seed: int) -> ParsedRequest:
        prompts: list[Any] = [form.prompt] if _is_single(form.prompt) else list(form.prompt)
        names = ["prompt"] if _is_single(form.prompt) else [f"prompt[{i}]" for i in range(len(prompts))]
        try:
            encoded = [self._tokenizer.encode(p, name) for p, name in zip(prompts, names, strict=True)]
        except UserError as error:
            raise of_user_error(error) from error
        if form.echo and form.stream:
            raise RequestError("echo is not implemented with stream: leave one of them out.", "echo", "unsupported")
        generates = form.max_tokens != 0
        stated = form.max_tokens if generates else 1
        return ParsedRequest(
            is_chat=False,
            model=form.model,
            sequences=self._sequences(form, "prompt", encoded, stated, DEFAULT_MAX_TOKENS, seed, form.logprobs),
            num_prompts=len(encoded),
            logprobs=form.logprobs,
            echo=bool(form.echo),
            generates=generates,
            streams=bool(form.stream),
            include_usage=form.stream_options is not None and form.stream_options.include_usage,
        )

    def _sequences(
        self,
        form: Form,
        field: str,
        prompts: Sequence[list[int]],
        max_tokens: int | None,
        unstated: int,
        seed: int,
        logprobs: int | None,
    ) -> tuple[GenerationRequest, ...]:
        """max_tokens: as the request states it; unstated: of one that does not, as far as there is room."""
        limits, choices = self._limits, form.n or 1
        if max_tokens is not None and max_tokens > limits.answer_tokens:
            message = f"max_tokens = {max_tokens}: at most {limits.answer_tokens} are answered here."
            raise RequestError(message, "max_tokens", "invalid_value")
        if len(prompts) * choices > limits.choices:
            message = f"{len(prompts)} prompts with {choices} answers each: at most {limits.choices} answers a request."
            raise RequestError(message, "n", "invalid_value")
        if max_tokens is None:
            room = self._shape.max_positions - max(map(len, prompts)) + 1
            max_tokens = max(1, min(unstated, limits.answer_tokens, room))
        try:
            params = _params(form, max_tokens, seed, logprobs)
        except UserError as error:
            raise of_user_error(error) from error
        for prompt in prompts:
            self._check(prompt, field, params.max_tokens)
        return tuple(
            GenerationRequest(prompt, params, choice * len(prompts) + place)
            for place, prompt in enumerate(prompts)
            for choice in range(choices)
        )

    def _check(self, prompt: Sequence[int], field: str, max_tokens: int) -> None:
        most = self._limits.prompt_tokens
        if len(prompt) > most:
            message = f"{field} has {len(prompt)} tokens: at most {most} are taken here."
            raise RequestError(message, field, "context_length_exceeded")
        try:
            check_prompt(self._shape, field, prompt, max_tokens)
        except UserError as error:
            too_long = len(prompt) + max_tokens - 1 > self._shape.max_positions
            request_error = of_user_error(error, field)
            raise RequestError(
                request_error.message, field, "context_length_exceeded" if too_long else "invalid_value"
            ) from error


def _params(form: Form, max_tokens: int, seed: int, logprobs: int | None) -> SamplingParams:
    """OpenAI's defaults, which are not those of SamplingParams: a temperature of 1."""
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if form.temperature is None else form.temperature,
        top_k=form.top_k or 0,
        top_p=1.0 if form.top_p is None else form.top_p,
        repetition_penalty=1.0 if form.repetition_penalty is None else form.repetition_penalty,
        stop=form.stop,
        stop_token_ids=form.stop_token_ids,
        ignore_eos=bool(form.ignore_eos),
        seed=seed if form.seed is None else form.seed,
        logprobs=logprobs,
    )


def _is_single(prompt: Any) -> bool:
    return isinstance(prompt, str) or isinstance(prompt[0], int)
