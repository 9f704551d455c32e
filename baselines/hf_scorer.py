"""Scores and answers of a transformers model, however its weights are held: batches sorted by length, padded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from baselines.hf_generate import padded
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.outputs import Score
from flexgen_bench.engine.text_stream import TextStream
from flexgen_bench.engine.tokenization import TextTokenizer
from flexgen_bench.schedule.prefix_tree import ScoreRequest
from flexgen_bench.systems.scorer import OnScore, OnTokens, Scorer


class HFScorer(Scorer):
    """``batch_size`` sequences at once. Requests that differ in nothing but their last token are computed once."""

    def __init__(self, model: Any, device: torch.device, batch_size: int, checkpoint: Path) -> None:
        self._model, self._device, self._batch_size = model, device, batch_size
        self._tokenizer = TextTokenizer(checkpoint)

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest], on_score: OnScore) -> None:
        same: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            same[tuple(request.tokens[:-1])].append(index)
        order = sorted(same, key=lambda fed: (-len(fed), fed))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            for fed, logits in zip(batch, self._logits(batch), strict=True):
                for index in same[fed]:
                    on_score(index, _score(logits[: len(fed)], requests[index]))

    @torch.inference_mode()
    def log_probabilities(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        for tokens in sequences:
            yield self._logits([tokens[:-1]])[0].float().log_softmax(-1)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], on_tokens: OnTokens) -> None:
        alike: dict[SamplingParams, list[int]] = defaultdict(list)
        for index, sampling in enumerate(params):
            alike[sampling].append(index)
        for sampling, members in alike.items():
            order = sorted(members, key=lambda i: -len(prompts[i]))
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                continuations = self._continue([prompts[i] for i in batch], sampling)
                for index, tokens in zip(batch, continuations, strict=True):
                    on_tokens(index, tokens)

    def close(self) -> None:
        self._model = None

    def _logits(self, batch: Sequence[Sequence[int]]) -> Tensor:
        """(B, T, V) of sequences padded on the right, where no token that counts can look: no mask is needed."""
        ids, _ = padded(batch, left=False)
        logits: Tensor = self._model(ids.to(self._device), use_cache=False).logits
        return logits

    def _continue(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
        ids, mask = padded(prompts, left=True)
        ends = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            ends |= self._tokenizer.end_ids
        options: dict[str, Any] = {"do_sample": not params.greedy}
        if not params.greedy:
            torch.manual_seed(params.seed)
            options |= {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p}
        texts = [self._tokenizer.stream(prompt, params.stop or ()) for prompt in prompts]
        stop = _Stop(ids.shape[1], texts, ends)
        output = self._model.generate(
            ids.to(self._device),
            attention_mask=mask.to(self._device),
            max_new_tokens=params.max_tokens,
            repetition_penalty=params.repetition_penalty,
            stopping_criteria=[stop],
            **options,
        )
        return stop.cut(output[:, ids.shape[1] :].tolist())


class _Stop(StoppingCriteria):
    """Ends each sequence after an end id or a stop string."""

    def __init__(self, start: int, texts: Sequence[TextStream], ends: set[int]) -> None:
        self._start, self._texts, self._ends = start, texts, ends
        self._lengths: list[int | None] = [None] * len(texts)  # of those that have ended

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for row, new in enumerate(input_ids[:, self._start :].tolist()):
            if self._lengths[row] is None and self._is_done(row, new):
                self._lengths[row] = len(new)
        done = [length is not None for length in self._lengths]
        return torch.tensor(done, device=input_ids.device)

    def cut(self, rows: list[list[int]]) -> list[list[int]]:
        """Without what was generated for a sequence after its end, while others went on."""
        return [new[:length] for new, length in zip(rows, self._lengths, strict=True)]

    def _is_done(self, row: int, new: list[int]) -> bool:
        return new[-1] in self._ends or self._texts[row].follow(new)


def _score(logits: Tensor, request: ScoreRequest) -> Score:
    """logits (T, V): after each fed token."""
    targets = torch.tensor(list(request.tokens[request.start :]), device=logits.device)
    rows = logits[request.start - 1 :].float()
    chosen = rows.log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()
    return Score(sum(chosen), bool((rows.argmax(-1) == targets).all()), tuple(chosen))
