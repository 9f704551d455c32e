"""Bodies of ``/v1/completions`` and ``/v1/chat/completions``, as OpenAI's API has them.

What would change an answer and is not implemented is refused, unless it has the value that changes nothing. Beyond
OpenAI's fields there are those of ``SamplingParams``: top_k, repetition_penalty, ignore_eos, stop_token_ids.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flexgen_bench.requests.errors import RequestError

MOST_CHOICES = 128
MOST_LOGPROBS = 20
MOST_STOPS = 16

Text = Annotated[str, Field(min_length=1)]


class StreamOptions(BaseModel):
    """include_usage: a last chunk that counts tokens. include_obfuscation: padding, which is left out."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Form(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="forbid", strict=True)
    # What is not implemented, with the values that ask for nothing.
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "presence_penalty": (None, 0),
        "frequency_penalty": (None, 0),
        "logit_bias": (None, {}),
    }

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Names and labels: kept nowhere, and without influence on an answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None

    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_implemented(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for name, values in cls.neutral.items():
                if given.get(name) not in values:
                    raise RequestError(f"{name} is not implemented: leave it out.", name, "unsupported_parameter")
        return given

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Form:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream = true.", "stream_options", "invalid_value")
        return self


class CompletionForm(Form):
    """``/v1/completions``: one or more prompts, each a text or token ids."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {**Form.neutral, "suffix": (None, ""), "best_of": (None, 1)}

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: Any = None
    best_of: Any = None

    @model_validator(mode="after")
    def _something_to_do(self) -> CompletionForm:
        if self.prompt == []:
            raise RequestError("prompt = []: must hold a prompt.", "prompt", "invalid_value")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens = 0 asks for nothing without echo = true.", "max_tokens", "invalid_value")
        return self


class ChatForm(Form):
    """``/v1/chat/completions``: a conversation."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        **Form.neutral,
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "parallel_tool_calls": (None, True, False),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "response_format": (None, {"type": "text"}),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "reasoning_effort": (None,),
        "verbosity": (None,),
        "web_search_options": (None,),
    }

    messages: list[Any]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    @model_validator(mode="after")
    def _logprobs_agree(self) -> ChatForm:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs = true.", "top_logprobs", "invalid_value")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            message = "max_tokens and max_completion_tokens differ: give one of them."
            raise RequestError(message, "max_completion_tokens", "invalid_value")
        return self


COMPLETIONS: Literal["/v1/completions"] = "/v1/completions"
CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
FORMS: dict[str, type[CompletionForm] | type[ChatForm]] = {COMPLETIONS: CompletionForm, CHAT: ChatForm}
