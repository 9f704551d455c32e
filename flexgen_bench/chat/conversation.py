"""A conversation with one model. What it has computed of earlier turns is kept and not computed again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.generation import KeptTokens
from flexgen_bench.engine.outputs import GenerationRequest
from flexgen_bench.llm.llm import LLM
from flexgen_bench.requests.chat_template import encode_chat
from flexgen_bench.schedule.sequence_groups import Capacity


@dataclass(frozen=True)
class TurnStats:
    """One answer: tokens of the conversation before it, how many of these were kept from earlier turns, new tokens,
    seconds to the first of them and to the last."""

    prompt_tokens: int
    kept_tokens: int
    new_tokens: int
    first_s: float
    total_s: float

    def __str__(self) -> str:
        computed = self.prompt_tokens - self.kept_tokens
        rest = self.total_s - self.first_s
        speed = f", {(self.new_tokens - 1) / rest:.1f} tok/s" if rest > 0 and self.new_tokens > 1 else ""
        return (
            f"{self.prompt_tokens} tokens before it, {self.kept_tokens} of them kept and {computed} computed; "
            f"first word after {self.first_s:.2f} s, {self.new_tokens} new tokens in {self.total_s:.2f} s{speed}"
        )


def capacity_of(llm: LLM, params: SamplingParams, context: int) -> Capacity:
    """Of a job for one conversation. context: most tokens of it, its last answer included. UserError for one that the
    model cannot have, or in which an answer has no room."""
    if not 1 < context <= llm.shape.max_positions:
        raise UserError("context", context, f"from 2 to {llm.shape.max_positions} for {llm.shape.name}")
    if params.max_tokens >= context:
        raise UserError("max_tokens", params.max_tokens, f"below context ({context})", "Raise context=.")
    return Capacity(1, context - params.max_tokens + 1, params.max_tokens, kept_tokens=context)


class Conversation:
    """Turns of one user with one model.

    params: of every answer; its ``max_tokens`` is the most that an answer has. capacity: see ``capacity_of``; its
    memory is taken at once. Use as a context manager.
    """

    def __init__(self, llm: LLM, params: SamplingParams, capacity: Capacity, system: str = "") -> None:
        self._llm, self._params, self._capacity = llm, params, capacity
        self.messages: list[dict[str, str]] = []
        self.stats: list[TurnStats] = []
        self._kept: KeptTokens | None = None
        self._job = llm.open(capacity)
        self.reset(system)

    @property
    def keeps(self) -> bool:
        """Whether earlier turns are kept: where the cache lies in the memory of what computes with it."""
        return self._job.capacity.keeps

    def reset(self, system: str | None = None) -> None:
        """Begin anew. system: what the model is told before everything else; None: what it was told before."""
        if system is None:
            system = self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else ""
        self.messages = [{"role": "system", "content": system}] if system else []

    def say(self, text: str) -> Iterator[str]:
        """Give the model a turn; its answer, piece by piece, one for each pass. Whoever stops reading ends the answer:
        what has come is part of the conversation, as far as it has come.

        UserError, and nothing has changed, where the conversation has become too long.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = encode_chat(self._llm.tokenizer, messages)
        most = self._capacity.prompt_len
        if len(ids) > most:
            raise UserError(
                "conversation",
                f"{len(ids)} tokens",
                f"at most {most}, so that an answer of {self._params.max_tokens} has room",
                "Begin anew with /reset, or start with a larger context=.",
            )
        return self._answer(messages, ids)

    def save(self, path: Path) -> None:
        """Write the conversation as JSON: messages, and what each answer took. Nothing is overwritten."""
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(self._saved(), file, ensure_ascii=False, indent=1)
        except FileExistsError as error:
            raise UserError("/save", str(path), "a new file", "Nothing is overwritten.") from error
        except OSError as error:
            raise UserError("/save", str(path), f"a file that can be written ({error.strerror})") from error

    def close(self) -> None:
        self._job.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answer(self, messages: list[dict[str, str]], ids: list[int]) -> Iterator[str]:
        begin = time.perf_counter()
        # Another random stream for each turn, the same in every run of the same conversation.
        params = replace(self._params, seed=self._params.seed + len(messages))
        sequence = self._job.start(GenerationRequest(ids, params))
        sequence.prefix, sequence.keep = self._kept, True
        kept = self._kept.in_common(ids) if self._kept is not None and self.keeps else 0
        first, said = 0.0, ""
        number = self._job.add(sequence)
        try:
            while not self._job.is_idle:
                for _, piece in self._job.step():
                    first = first or time.perf_counter() - begin
                    self._kept = sequence.prefix = None  # it is in the cache now; memory is for one conversation
                    said += piece.text
                    yield piece.text
        finally:
            if not sequence.finish_reason:
                self._end(number)
            self._kept = sequence.kept or self._kept
            self.messages = [*messages, {"role": "assistant", "content": said}]
            total = time.perf_counter() - begin
            self.stats.append(TurnStats(len(ids), kept, len(sequence.new), first, total))

    def _end(self, number: int) -> None:
        """End an answer before its time. After a failure the job is closed, and a new one takes its place."""
        try:
            self._job.cancel(number)
            self._job.step()
        except UserError:  # closed by whatever went wrong
            self._job = self._llm.open(self._capacity)
            self._kept = None

    def _saved(self) -> dict[str, Any]:
        return {"model": self._llm.shape.name, "messages": self.messages, "answers": [str(s) for s in self.stats]}
