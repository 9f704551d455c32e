"""Generation and scoring: which tokens are fed, and what becomes of the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.sampling import Sampler
from flexgen_bench.planner.program import ending, last_rows
from flexgen_bench.schedule.cohort import Cohort
from flexgen_bench.schedule.micro_batch import Member, MicroBatch


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


def to_full_length(prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Running]:
    """One sequence per prompt, which nothing ends before ``max_tokens``."""
    return [
        Running(prompt, params, Sampler(params, prompt, i), frozenset(), lambda new: False)
        for i, prompt in enumerate(prompts)
    ]


class Generation:
    """Feeds tokens to micro-batches and samples the next ones. ``sequences`` are numbered as in the job."""

    def __init__(self, sequences: Sequence[Running]) -> None:
        self._sequences = sequences
        # Whether the host needs no more than the number of the largest logit.
        self.is_greedy = all(_plain_greedy(s.params) for s in sequences)

    def tokens(self, member: Member) -> Sequence[int]:
        mine = [self._sequences[i] for i in member.cohort.sequences]
        if member.token:
            return [sequence.new[member.token - 1] for sequence in mine]
        return [
            token
            for sequence, (first, last) in zip(mine, member.ranges, strict=True)
            for token in sequence.prompt[first:last]
        ]

    def wanted(self, member: Member) -> Sequence[int]:
        """The last row of every sequence whose prompt ends here, or which decodes."""
        return last_rows(member)

    def reduce(self, work: MicroBatch, head: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Logits, or their greedy choice if every sequence of the job wants only that."""
        logits = head(x)
        return logits.argmax(dim=-1) if self.is_greedy else logits.float()

    def finish(self, work: MicroBatch, found: Tensor) -> None:
        numbers = [m.cohort.sequences[place] for m in work.members for place in ending(m)]
        chosen = found.tolist() if self.is_greedy else None
        for row, i in enumerate(numbers):
            sequence = self._sequences[i]
            sequence.take(chosen[row] if chosen else sequence.sampler.choose(found[row]))

    def ended(self, cohort: Cohort) -> list[int]:
        """Sequences of a cohort that have nothing left to do."""
        return [i for i in cohort.sequences if self._sequences[i].finish_reason]


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
        self.results: dict[int, list[tuple[float, bool]]] = {i: [] for i in range(len(requests))}

    def tokens(self, member: Member) -> Sequence[int]:
        return [
            token
            for i, (first, last) in zip(member.cohort.sequences, member.ranges, strict=True)
            for token in self._requests[i].tokens[first:last]
        ]

    def wanted(self, member: Member) -> Sequence[int]:
        """The row before each scored token predicts it."""
        return [
            member.offsets[place] + target - 1 - member.ranges[place][0]
            for place, targets in enumerate(self._targets(member))
            for target in targets
        ]

    def reduce(self, work: MicroBatch, head: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """(log-probability, is argmax) of every target, on the compute device."""
        targets = torch.tensor(
            [
                self._requests[i].tokens[target]
                for member in work.members
                for i, own in zip(member.cohort.sequences, self._targets(member), strict=True)
                for target in own
            ]
        )
        if x.is_cuda:
            targets = targets.pin_memory().to(x.device, non_blocking=True)
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
        return torch.cat(pieces)

    def finish(self, work: MicroBatch, found: Tensor) -> None:
        row = 0
        for member in work.members:
            for i, targets in zip(member.cohort.sequences, self._targets(member), strict=True):
                rows = found[row : row + len(targets)].tolist()
                self.results[i] += [(float(p), bool(g)) for p, g in rows]
                row += len(targets)

    def ended(self, cohort: Cohort) -> list[int]:
        """A prompt is all there is."""
        return list(cohort.sequences)

    def _targets(self, member: Member) -> list[range]:
        """Per sequence, the positions of scored tokens that rows of this member predict."""
        found = []
        for i, (first, last) in zip(member.cohort.sequences, member.ranges, strict=True):
            request = self._requests[i]
            start = max(request.start, first + 1)
            found.append(range(start, max(start, min(len(request.tokens), last + 1))))
        return found
