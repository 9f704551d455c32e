"""From logits to tokens. Each sequence has its own random stream, so results do not depend on batching."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.outputs import TokenLogprobs

# Beyond these a temperature is the greedy choice, and a penalty decides alone; float32 would overflow.
LEAST_TEMPERATURE = 1e-10
LEAST_PENALTY, MOST_PENALTY = 1e-10, 1e10


class Sampler:
    """Chooses the next token of one sequence."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], stream: int) -> None:
        self._params = params
        self._temperature = max(params.temperature, LEAST_TEMPERATURE)
        self._penalty = min(max(params.repetition_penalty, LEAST_PENALTY), MOST_PENALTY)
        self._seen = set(prompt)
        self._generator: torch.Generator | None = None
        if not params.greedy:
            self._generator = torch.Generator().manual_seed(_mix(params.seed, stream))

    def choose(self, logits: Tensor) -> int:
        """The next token for logits (vocab,), which are not changed."""
        p = self._params
        if p.repetition_penalty != 1.0:
            logits = _penalise(logits.float(), self._seen, self._penalty)
        if p.greedy:
            token = int(logits.argmax())
        else:
            probabilities = _filtered(logits.float() / self._temperature, p.top_k, p.top_p)
            token = int(torch.multinomial(probabilities, 1, generator=self._generator))
        self._seen.add(token)
        return token


def likeliest(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """The log-probability of ``token`` under logits (V,), and the ``count`` likeliest tokens with theirs."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return TokenLogprobs(float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _mix(seed: int, stream: int) -> int:
    """One seed per (seed, sequence): consecutive numbers must not give overlapping streams."""
    return (seed * 0x9E3779B97F4A7C15 + stream * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63


def _penalise(logits: Tensor, seen: set[int], penalty: float) -> Tensor:
    """Keskar et al. 2019: divide positive logits of seen tokens by the penalty, multiply negative ones."""
    index = torch.tensor(sorted(seen), dtype=torch.long)
    chosen = logits[index]
    logits = logits.clone()
    logits[index] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    return logits


def _filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities after top-k, then top-p (Holtzman et al. 2020): the smallest set reaching top_p stays."""
    if top_k and top_k < len(logits):
        kth = torch.topk(logits, top_k).values[-1]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probabilities = torch.softmax(logits, dim=-1)
    if top_p < 1.0:
        ordered, order = torch.sort(probabilities, descending=True)
        before = torch.cumsum(ordered, dim=-1) - ordered
        probabilities = probabilities.scatter(0, order, torch.where(before < top_p, ordered, torch.zeros(())))
        probabilities = probabilities / probabilities.sum()
    return probabilities
