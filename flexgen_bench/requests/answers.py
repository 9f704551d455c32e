"""From what the engine has produced to bodies of answers, as OpenAI's API has them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from flexgen_bench.engine.outputs import Output, Piece, TokenLogprobs
from flexgen_bench.engine.tokenization import TextTokenizer
from flexgen_bench.requests.asked import ParsedRequest

# Of one token of a prompt: None for the first, which nothing predicts.
PromptLogprobs = Sequence[TokenLogprobs | None]


def new_id(parsed: ParsedRequest) -> str:
    """A name for an answer, which no other has."""
    return f"{'chatcmpl' if parsed.is_chat else 'cmpl'}-{uuid.uuid4().hex}"


class Writer:
    """Writes answers with one model's tokens as text."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def body(
        self,
        parsed: ParsedRequest,
        outputs: Sequence[Output],
        of_prompts: Sequence[PromptLogprobs] = (),
        kept_tokens: int | None = None,
    ) -> dict[str, Any]:
        """The whole answer. outputs: one for each of ``parsed.sequences`` (none if it generates nothing); of_prompts:
        the log-probabilities of their prompts' tokens, where they are asked for; kept_tokens: see ``usage_of``."""
        make = self._chat_choice if parsed.is_chat else self._completion_choice
        choices = []
        for index, sequence in enumerate(parsed.sequences):
            output = (
                outputs[index] if outputs else Output(sequence.prompt, tuple(parsed.prompts[index]), (), "", "length")
            )
            choices.append(make(parsed, index, output, of_prompts[index] if of_prompts else None))
        usage = usage_of(parsed, sum(len(output.token_ids) for output in outputs), kept_tokens)
        kind = "chat.completion" if parsed.is_chat else "text_completion"
        return self._frame(parsed, kind, new_id(parsed), choices) | {"usage": usage}

    def chunk(
        self, parsed: ParsedRequest, answer_id: str, index: int, piece: Piece, place: int | None
    ) -> dict[str, Any]:
        """A part of a streamed answer: what is new in one of its choices. place: characters of the tokens before it;
        None: it is the first of its choice."""
        is_first, reason = place is None, piece.finish_reason or None
        choice: dict[str, Any] = {"index": index}
        if parsed.is_chat:
            role = {"role": "assistant"} if is_first else {}
            choice["delta"] = role | ({"content": piece.text} if piece.text or is_first else {})
        else:
            choice["text"] = piece.text
        choice["logprobs"] = self._logprobs(parsed, piece.token_ids, piece.logprobs, None, place or 0)
        choice["finish_reason"] = reason
        kind = "chat.completion.chunk" if parsed.is_chat else "text_completion"
        usage = {"usage": None} if parsed.include_usage else {}
        return self._frame(parsed, kind, answer_id, [choice]) | usage

    def characters(self, token_ids: Sequence[int]) -> int:
        """Of tokens as log-probabilities show them."""
        return sum(len(self._shown(token)) for token in token_ids)

    def usage_chunk(self, parsed: ParsedRequest, answer_id: str, usage: dict[str, Any]) -> dict[str, Any]:
        """The last part of a streamed answer, if it is to count tokens."""
        kind = "chat.completion.chunk" if parsed.is_chat else "text_completion"
        return self._frame(parsed, kind, answer_id, []) | {"usage": usage}

    def _frame(self, parsed: ParsedRequest, kind: str, answer_id: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": answer_id, "object": kind, "created": int(time.time()), "model": parsed.model, "choices": choices}

    def _chat_choice(
        self, parsed: ParsedRequest, index: int, output: Output, prompt: PromptLogprobs | None
    ) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": self._logprobs(parsed, output.token_ids, output.logprobs or (), None),
            "finish_reason": output.finish_reason,
        }

    def _completion_choice(
        self, parsed: ParsedRequest, index: int, output: Output, prompt: PromptLogprobs | None
    ) -> dict[str, Any]:
        before = self._tokenizer.text_after((), output.prompt_token_ids) if parsed.echo else ""
        ids = (*output.prompt_token_ids, *output.token_ids) if parsed.echo else output.token_ids
        return {
            "index": index,
            "text": before + output.text,
            "logprobs": self._logprobs(parsed, ids, output.logprobs or (), prompt),
            "finish_reason": output.finish_reason,
        }

    def _logprobs(
        self,
        parsed: ParsedRequest,
        ids: Sequence[int],
        own: Sequence[TokenLogprobs],
        prompt: PromptLogprobs | None,
        place: int = 0,
    ) -> dict[str, Any] | None:
        if parsed.logprobs is None:
            return None
        if parsed.is_chat:
            return {
                "content": [
                    self._named(i, p.logprob) | {"top_logprobs": self._top(p)} for i, p in zip(ids, own, strict=True)
                ]
            }
        token_logprobs: list[TokenLogprobs | None] = [*(prompt or ()), *own]
        tokens = [self._shown(i) for i in ids]
        places = list(accumulate(map(len, tokens), initial=place))[:-1]
        return {
            "tokens": tokens,
            "token_logprobs": [p and p.logprob for p in token_logprobs],
            "top_logprobs": [p and self._by_name(i, p) for i, p in zip(ids, token_logprobs, strict=True)],
            "text_offset": places,
        }

    def _by_name(self, token: int, token_logprobs: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens and the chosen one. Of several that look alike the likeliest counts."""
        named: dict[str, float] = {}
        for other, logprob in (*token_logprobs.top, (token, token_logprobs.logprob)):
            named.setdefault(self._shown(other), logprob)
        return named

    def _top(self, token_logprobs: TokenLogprobs) -> list[dict[str, Any]]:
        return [self._named(token, logprob) for token, logprob in token_logprobs.top]

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._shown(token), "logprob": logprob, "bytes": list(self._tokenizer.bytes_of(token))}

    def _shown(self, token: int) -> str:
        """A token's text; of one that is no text by itself, its bytes, as OpenAI's API shows them."""
        raw = self._tokenizer.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def usage_of(parsed: ParsedRequest, answer_tokens: int, kept_tokens: int | None = None) -> dict[str, Any]:
    """Tokens as they are counted for a bill: a prompt once, however many answers it gets. kept_tokens: of the prompts,
    those that an earlier request has computed; None: nobody has kept any."""
    choices = len(parsed.sequences) // parsed.num_prompts
    prompt_tokens = sum(len(prompt) for prompt in parsed.prompts[::choices])
    details = {} if kept_tokens is None else {"prompt_tokens_details": {"cached_tokens": kept_tokens}}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
        **details,
    }
