"""Scoring by decoding: a continuation's tokens are fed one by one through the cache, as if they had been generated.

Slow, and therefore no part of the engine: what its scoring is compared with. A mode whose losses only decoding shows
(sparse attention on values) would look free if continuations were scored by a plain prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flexgen_bench.engine.generation import Chosen
from flexgen_bench.schedule.micro_batch import Member, MicroBatch
from flexgen_bench.schedule.prefix_tree import ScoreRequest
from flexgen_bench.schedule.scheduler import ending, last_rows
from flexgen_bench.schedule.sequence_group import SequenceGroup
from flexgen_bench.schedule.sequence_groups import Request


class Forced:
    """Everything before the last token of the context is the prompt; that token and the continuation are decoded.

    So every scored token is predicted by a decode step. (After a context of one token the first one is predicted by its
    prefill, where one value row is all there is.) ``results[i]``: per token of the continuation (log-probability, is
    argmax).
    """

    def __init__(self, requests: Sequence[ScoreRequest]) -> None:
        self._requests = requests
        self._prompts = [max(1, r.start - 1) for r in requests]
        self._next = list(self._prompts)  # position of the token that is predicted next
        self.results: dict[int, list[tuple[float, bool]]] = {i: [] for i in range(len(requests))}

    def jobs(self) -> list[Request]:
        """What the engine has to plan for."""
        return [
            Request(prompt, len(r.tokens) - prompt) for prompt, r in zip(self._prompts, self._requests, strict=True)
        ]

    def tokens(self, member: Member) -> Sequence[int]:
        if member.token:
            return [self._requests[i].tokens[self._prompts[i] + member.token - 1] for i in member.group.sequences]
        return [
            token
            for i, (first, last) in zip(member.group.sequences, member.ranges, strict=True)
            for token in self._requests[i].tokens[first:last]
        ]

    def logit_rows(self, member: Member) -> Sequence[int]:
        return last_rows(member)

    def reduce(self, work: MicroBatch, head: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """(log-probability, is argmax) of the tokens to come."""
        logits = head(x).float()
        positions = [(i, self._position(m, i)) for m, i in self._ending(work)]
        targets = torch.tensor([self._requests[i].tokens[at] for i, at in positions])
        chosen = logits.log_softmax(-1).gather(1, targets[:, None])
        return torch.cat([chosen, (logits.argmax(-1) == targets).float()[:, None]], dim=1)

    def on_device(self, member: Member) -> bool:
        """Probabilities go to the host."""
        return False

    def finish(self, work: MicroBatch, reduced: Tensor) -> None:
        for row, (member, i) in enumerate(self._ending(work)):
            at, request = self._position(member, i), self._requests[i]
            self._next[i] = at + 1
            if at >= request.start:
                self.results[i].append((float(reduced[row, 0]), bool(reduced[row, 1])))

    def choose(self, work: MicroBatch, reduced: Tensor) -> list[Chosen]:
        """No token is chosen: the next ones are known."""
        return []

    def take(self, work: MicroBatch, chosen: Sequence[Chosen]) -> None:
        """Nothing was chosen."""

    def tree(self, sequence: int) -> None:
        """Prompts are plain sequences."""

    def ended(self, group: SequenceGroup) -> list[int]:
        """Sequences whose last token has been predicted."""
        return [i for i in group.sequences if self._next[i] >= len(self._requests[i].tokens)]

    def full(self, group: SequenceGroup, count: int) -> list[int]:
        """Sequences that need no token after so many."""
        return [i for i in group.sequences if self._prompts[i] + count >= len(self._requests[i].tokens)]

    def _ending(self, work: MicroBatch) -> list[tuple[Member, int]]:
        return [(m, m.group.sequences[place]) for m in work.members for place in ending(m)]

    def _position(self, member: Member, i: int) -> int:
        """Of the token that a member predicts for a sequence."""
        return self._prompts[i] + member.token
