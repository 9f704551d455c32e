"""Scoring: log-likelihoods of given tokens, in prefill only and without a cache. What sequences share is computed
once."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from flexgen_bench.engine.generation import Chosen
from flexgen_bench.planner.scoring import LOGIT_ROWS
from flexgen_bench.schedule.micro_batch import Member, MicroBatch
from flexgen_bench.schedule.prefix_tree import Prediction, PrefixTree
from flexgen_bench.schedule.sequence_group import SequenceGroup

# Rows whose probabilities are made at once: few enough for a processor's cache (43 against 155 ms for 256 rows of
# 49,152).
PIECE_ROWS = 16
# What is told of a request when all its tokens are scored: its number, and per token (log-probability, is the largest).
Found = Callable[[int, list[tuple[float, bool]]], None]


class PrefixTrees:
    """A job of prefix trees: what its kinds have in common."""

    def __init__(self, trees: Sequence[PrefixTree]) -> None:
        self._trees = trees

    def tokens(self, member: Member) -> Sequence[int]:
        return [
            token
            for i, (first, last) in zip(member.group.sequences, member.ranges, strict=True)
            for token in self._trees[i].tokens[first:last]
        ]

    def logit_rows(self, member: Member) -> Sequence[int]:
        """The rows that predict scored tokens, each once."""
        return [
            member.offsets[place] + row - first
            for place, (i, (first, last)) in enumerate(zip(member.group.sequences, member.ranges, strict=True))
            for row in self._trees[i].logit_rows
            if first <= row < last
        ]

    def on_device(self, member: Member) -> bool:
        """No token is chosen."""
        return False

    def choose(self, micro_batch: MicroBatch, reduced: Tensor) -> list[Chosen]:
        """No token is chosen."""
        return []

    def take(self, micro_batch: MicroBatch, chosen: Sequence[Chosen]) -> None:
        """No token is chosen."""

    def full(self, group: SequenceGroup, count: int) -> list[int]:
        """A prefix tree is done with its pass."""
        return list(group.sequences)

    def tree(self, sequence: int) -> PrefixTree:
        return self._trees[sequence]

    def ended(self, group: SequenceGroup) -> list[int]:
        """A prefix tree is all there is."""
        return list(group.sequences)


class Scoring(PrefixTrees):
    """``found`` is called with every request when it is done, by the thread that finishes it."""

    def __init__(self, trees: Sequence[PrefixTree], found: Found) -> None:
        super().__init__(trees)
        self._on_scored = found
        self._lengths = Counter(p.request for tree in trees for p in tree.predictions)
        self._tokens: dict[int, list[tuple[float, bool]]] = {i: [] for i in self._lengths}
        self._made: tuple[MicroBatch | None, list[Prediction]] = (None, [])

    def reduce(self, micro_batch: MicroBatch, head: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """(log-probability, is the largest) of every target, on the compute device."""
        predictions = self._predictions(micro_batch)
        both = torch.tensor([[p.row, p.target] for p in predictions]).T
        rows = [p.row for p in predictions]
        if x.is_cuda:
            both = both.contiguous().pin_memory().to(x.device, non_blocking=True)
        pieces, cursor = [], 0
        for start in range(0, x.shape[0], LOGIT_ROWS):
            logits = head(x[start : start + LOGIT_ROWS]).float()
            for first in range(0, logits.shape[0], PIECE_ROWS):
                stop = bisect_left(rows, start + first + PIECE_ROWS, cursor)
                own, targets = both[:, cursor:stop]
                cursor = stop
                pieces.append(_judge(logits[first : first + PIECE_ROWS], own - start - first, targets))
        return torch.cat(pieces, dim=1)

    def finish(self, micro_batch: MicroBatch, reduced: Tensor) -> None:
        for p, logprob, is_largest in zip(self._predictions(micro_batch), *reduced.tolist(), strict=True):
            tokens = self._tokens[p.request]
            tokens.append((logprob, bool(is_largest)))
            if len(tokens) == self._lengths[p.request]:
                self._on_scored(p.request, self._tokens.pop(p.request))

    def _predictions(self, micro_batch: MicroBatch) -> list[Prediction]:
        """Of the micro-batch's logit rows, with ``row`` counted among these, in the order of rows."""
        made, batch_predictions = self._made
        if made is micro_batch:
            return batch_predictions
        number = {row: place for place, row in enumerate(micro_batch.logit_rows)}
        batch_predictions = [
            Prediction(number[base + p.row], p.request, p.target)
            for base, predictions in self._bases(micro_batch)
            for p in predictions
        ]
        self._made = (micro_batch, batch_predictions)
        return batch_predictions

    def _bases(self, micro_batch: MicroBatch) -> Iterator[tuple[int, Sequence[Prediction]]]:
        """Of each sequence: what to add to its own rows to have the micro-batch's, and what is predicted here."""
        start = 0
        for member in micro_batch.members:
            ranges = zip(member.group.sequences, member.ranges, strict=True)
            for place, (i, (first, last)) in enumerate(ranges):
                own = self._trees[i].predictions
                low = bisect_left(own, first, key=lambda p: p.row)
                high = bisect_left(own, last, key=lambda p: p.row)
                yield start + member.offsets[place] - first, own[low:high]
            start += member.offsets[-1]


def _judge(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """logits (R, V) -> (2, P): of P targets, predicted by these rows, the log-probability and whether it is the
    largest.

    By torch's own ``log_softmax``, and not a more exact sum: the reference uses it, whose rounding (1e-5 a token at
    49,152 tokens, always to the same side) adds up in long texts.
    """
    chosen = logits.log_softmax(-1)[rows, targets]
    # Several times faster than argmax. Among equal ones that one would take the first, which is only looked for where a
    # target is among them.
    is_largest = logits[rows, targets] == logits.amax(-1)[rows]
    if not is_largest.is_cuda and bool(is_largest.any()):
        first = logits[rows[is_largest]].argmax(-1)
        is_largest[is_largest.clone()] = first == targets[is_largest]
    return torch.stack((chosen, is_largest.float()))


class LogProbabilities(PrefixTrees):
    """The whole distribution of every row, in the order of rows: ``found`` is called with the number of a prefix tree
    and (R, V) float32."""

    def __init__(self, trees: Sequence[PrefixTree], found: Callable[[int, Tensor], None]) -> None:
        super().__init__(trees)
        self._on_distributions = found

    def reduce(self, micro_batch: MicroBatch, head: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Log-probabilities (R, V) of the logit rows."""
        log_probs: Tensor | None = None
        for start in range(0, x.shape[0], LOGIT_ROWS):
            logits = head(x[start : start + LOGIT_ROWS])
            if log_probs is None:
                log_probs = torch.empty(x.shape[0], logits.shape[1], dtype=torch.float32, device=x.device)
            log_probs[start : start + LOGIT_ROWS] = logits.float().log_softmax(-1)
        assert log_probs is not None, "a micro-batch without wanted rows has no head"
        return log_probs

    def finish(self, micro_batch: MicroBatch, reduced: Tensor) -> None:
        row = 0
        for member in micro_batch.members:
            for i, (first, last) in zip(member.group.sequences, member.ranges, strict=True):
                count = sum(first <= logit_rows < last for logit_rows in self._trees[i].logit_rows)
                if count:
                    self._on_distributions(i, reduced[row : row + count])
                row += count
