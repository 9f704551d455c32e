"""Generation as a consumer of blocks: which tokens are fed, and what becomes of the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.sampling import Sampler
from flexgen_bench.schedule.job import MicroBatch


@dataclass
class Running:
    """One prompt on its way: what it has produced, and why it ended (empty: it goes on)."""

    prompt: Sequence[int]
    params: SamplingParams
    sampler: Sampler
    stop_ids: frozenset[int]
    stop_text: Callable[[list[int]], bool]
    new: list[int] = field(default_factory=list)
    finish_reason: str = ""

    def take(self, token: int) -> None:
        """Append one token and decide whether the sequence ends with it."""
        if self.finish_reason:
            return
        self.new.append(token)
        if token in self.stop_ids or self.stop_text(self.new):
            self.finish_reason = "stop"
        elif len(self.new) >= self.params.max_tokens:
            self.finish_reason = "length"


class Generation:
    """Feeds tokens to a block and samples the next ones. ``sequences`` are numbered as in the job."""

    def __init__(self, sequences: Sequence[Running]) -> None:
        self._sequences = sequences

    def tokens(self, batch: MicroBatch, token: int) -> Sequence[int]:
        members = [self._sequences[i] for i in batch.sequences]
        if token == 0:
            return [t for member in members for t in member.prompt]
        # A finished sequence keeps its place in the micro-batch; what it is fed does not matter.
        return [m.new[token - 1] if len(m.new) >= token else m.new[-1] for m in members]

    def rows(self, batch: MicroBatch, token: int) -> Sequence[int] | None:
        return None if token else [stop - 1 for stop in batch.offsets[1:]]

    def reduce(
        self, batch: MicroBatch, token: int, head: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        """Logits, or their greedy choice if every sequence wants only that."""
        logits = head(x)
        if all(_plain_greedy(self._sequences[i].params) for i in batch.sequences):
            return logits.argmax(dim=-1)
        return logits.float()

    def finish(self, batch: MicroBatch, token: int, found: Tensor) -> None:
        chosen = found.tolist() if found.dim() == 1 else None
        for row, i in enumerate(batch.sequences):
            sequence = self._sequences[i]
            if not sequence.finish_reason:
                sequence.take(chosen[row] if chosen else sequence.sampler.choose(found[row]))

    def is_done(self, batch: MicroBatch) -> bool:
        return all(self._sequences[i].finish_reason for i in batch.sequences)


def _plain_greedy(params: SamplingParams) -> bool:
    return params.greedy and params.repetition_penalty == 1.0


@dataclass(frozen=True)
class ScoreRequest:
    """Tokens whose continuation from ``start`` on is to be scored."""

    tokens: Sequence[int]
    start: int


class Scoring:
    """Log-likelihoods of continuations: prefill only, no cache. ``results[i]``: per token (log-probability, is argmax)."""

    # Rows of logits held at once; more would only take memory.
    rows_at_once = 256

    def __init__(self, requests: Sequence[ScoreRequest]) -> None:
        self._requests = requests
        self.results: dict[int, list[tuple[float, bool]]] = {}

    def tokens(self, batch: MicroBatch, token: int) -> Sequence[int]:
        return [t for i in batch.sequences for t in self._requests[i].tokens]

    def rows(self, batch: MicroBatch, token: int) -> Sequence[int]:
        """The row before each scored token predicts it."""
        return [
            batch.offsets[place] + position - 1
            for place, i in enumerate(batch.sequences)
            for position in range(self._requests[i].start, len(self._requests[i].tokens))
        ]

    def reduce(
        self, batch: MicroBatch, token: int, head: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        targets = torch.tensor(
            [
                t
                for i in batch.sequences
                for t in self._requests[i].tokens[self._requests[i].start :]
            ],
            device=x.device,
        )
        pieces = []
        for start in range(0, len(targets), self.rows_at_once):
            part = slice(start, start + self.rows_at_once)
            logits = head(x[part]).float()
            wanted = targets[part]
            chosen = logits.gather(1, wanted[:, None])[:, 0]
            pieces.append(
                torch.stack(
                    (chosen - logits.logsumexp(-1), (logits.argmax(-1) == wanted).float()), dim=1
                )
            )
        return torch.cat(pieces) if pieces else torch.empty((0, 2))

    def finish(self, batch: MicroBatch, token: int, found: Tensor) -> None:
        row = 0
        for i in batch.sequences:
            count = len(self._requests[i].tokens) - self._requests[i].start
            self.results[i] = [(float(p), bool(g)) for p, g in found[row : row + count].tolist()]
            row += count
