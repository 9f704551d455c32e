"""Token sequences that begin alike, laid out so that what they share is computed once.

A prefix tree is a flat list of rows, one per token. A row's *parent* is the token before it; sequences that share a
prefix share its rows and branch off behind it. Rows are in depth-first order, so a parent comes before its children and
everything below a row is contiguous. A row attends to its ancestors and itself; its position is its number of
ancestors. A prefix tree is computed like one prompt, so nothing is padded and sequences of any lengths are multiplied
together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

# Attention is priced in pairs of a query and a key. What a call costs beyond its pairs, and what computing a row costs
# beside its attention, in pairs (measured for SmolLM2-135M: docs/notes/accuracy_scoring.md). Only speed depends on
# them.
CALL_PAIRS = 1000
ROW_PAIRS = 1500
# A new prefix tree is begun when this share of the rows so far, or less, is computed again in it.
REPEATED = 0.1


@dataclass(frozen=True)
class ScoreRequest:
    """Tokens whose continuation from ``start`` on is to be scored; ``start`` is at least 1."""

    tokens: Sequence[int]
    start: int


@dataclass(frozen=True)
class Block:
    """Rows ``start .. stop-1`` that attend in one call: to all rows of ``before`` (ranges, in order) and to their
    ancestors in the block, which are all earlier rows of the block unless it ``branches``."""

    start: int
    stop: int
    before: tuple[tuple[int, int], ...]
    branches: bool


class Prediction(NamedTuple):
    """A row that predicts a scored token of a request."""

    row: int
    request: int
    target: int


@dataclass(frozen=True)
class PrefixTree:
    """Rows, their parents (-1: none) and positions, and what they predict, in the order of rows."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    positions: tuple[int, ...]
    predictions: tuple[Prediction, ...]

    @property
    def rows(self) -> int:
        return len(self.tokens)

    @cached_property
    def logit_rows(self) -> tuple[int, ...]:
        """Rows whose logits are needed, ascending: each once, however many continuations it predicts."""
        return tuple(dict.fromkeys(p.row for p in self.predictions))

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """How the prefix tree's attention is cut into calls, ascending and without gaps."""
        return tuple(_blocks(self.parents))


def grow(requests: Sequence[ScoreRequest], rows: int) -> list[PrefixTree]:
    """Lay requests out in prefix trees of about ``rows`` rows.

    The last token of a request predicts nothing and is left out. A prefix tree is closed at ``rows`` rows, except where
    many rows would be computed again in the next one (a long prefix that many requests share): then later, at most at
    eight times as many.
    """
    of = [tuple(request.tokens) for request in requests]
    trees: list[PrefixTree] = []
    growing = _Growing()
    for number in sorted(range(len(requests)), key=of.__getitem__):
        tokens = of[number]
        shared = growing.shared(tokens, requests[number].start)
        added = len(tokens) - 1 - shared
        full = growing.rows and growing.rows + added > rows
        if full and (shared <= REPEATED * growing.rows or growing.rows + added > 8 * rows):
            trees.append(growing.done())
            growing, shared = _Growing(), 0
        growing.add(number, tokens, requests[number].start, shared)
    if growing.rows:
        trees.append(growing.done())
    return trees


class _Growing:
    """A prefix tree to which requests are added in the order of their tokens."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._parents: list[int] = []
        self._positions: list[int] = []
        self._predictions: list[Prediction] = []
        self._path: list[int] = []  # rows of the last request
        self._last: tuple[int, ...] = ()  # its tokens, and where its scored ones start
        self._start = 0

    @property
    def rows(self) -> int:
        return len(self._tokens)

    def shared(self, tokens: tuple[int, ...], start: int) -> int:
        """How many of the last request's rows a request takes over: none, if attending past them costs more than they
        do.

        Only rows that predict scored tokens of both or of neither: sparse attention tells these apart.
        """
        most = min(len(self._path), len(tokens) - 1)
        if start != self._start:
            most = min(most, start - 1, self._start - 1)
        count = 0
        while count < most and self._last[count : count + 64] == tokens[count : count + 64]:
            count += 64
        while count < most and self._last[count] == tokens[count]:
            count += 1
        count = min(count, most)
        own = len(tokens) - 1 - count
        return count if count * ROW_PAIRS >= own * own / 2 else 0

    def add(self, number: int, tokens: tuple[int, ...], start: int, shared: int) -> None:
        del self._path[shared:]
        for position in range(shared, len(tokens) - 1):
            self._parents.append(self._path[-1] if self._path else -1)
            self._path.append(len(self._tokens))
            self._tokens.append(tokens[position])
            self._positions.append(position)
        self._last, self._start = tokens, start
        for row, target in zip(self._path[start - 1 :], tokens[start:], strict=True):
            self._predictions.append(Prediction(row, number, target))

    def done(self) -> PrefixTree:
        return PrefixTree(
            tuple(self._tokens), tuple(self._parents), tuple(self._positions), tuple(sorted(self._predictions))
        )


@dataclass
class _Run:
    """Rows ``start .. stop-1`` without a branch between them, and what branches off behind the last of them: its
    *crown*.

    parent: number of the run it branches off (-1: none). before: how many rows all of its rows attend to besides.
    below: one after the last row of the crown. separate: pairs of the runs of the crown, each with calls of its own.
    """

    start: int
    stop: int
    parent: int
    before: int
    below: int = 0
    separate: int = 0
    one_call: bool = False  # for the run and its crown
    one_crown: bool = False  # the run has a call of its own, all of its crown another one


def _blocks(parents: Sequence[int]) -> Iterator[Block]:
    """The cheapest of three ways for each run, from the leaves to the roots: one call for it and its crown, one for
    each of the two, or one for it and more for what is in its crown. One call for several runs computes all their
    pairs, wanted or not."""
    runs = _runs(parents)
    for run in reversed(runs):  # the runs of a crown come after its run
        run.below = max(run.below, run.stop)
        own, crown = run.stop - run.start, run.below - run.stop
        pairs = own * (run.before + own) if run.before else own * own // 2
        if crown:
            together = crown * (run.before + own + crown) + CALL_PAIRS
            whole = (own + crown) * (run.before + own + crown)
            run.one_crown = together < run.separate
            pairs += min(together, run.separate)
            run.one_call = whole < pairs
            pairs = min(whole, pairs)
        if run.parent >= 0:
            above = runs[run.parent]
            above.below = max(above.below, run.below)
            above.separate += pairs + CALL_PAIRS
    paths: list[tuple[tuple[int, int], ...]] = []  # of each run: the rows before it, and its own
    covered = 0
    for run in runs:
        before = paths[run.parent] if run.parent >= 0 else ()
        paths.append(_joined(before, (run.start, run.stop)))
        if run.start < covered:
            continue
        covered = run.below if run.one_call else run.stop
        yield Block(run.start, covered, before, run.one_call)
        if run.one_crown and not run.one_call:
            yield Block(run.stop, run.below, paths[-1], True)
            covered = run.below


def _runs(parents: Sequence[int]) -> list[_Run]:
    """Ascending. A run ends where its last row has no child, or several."""
    counts = [0] * len(parents)
    for parent in parents:
        if parent >= 0:
            counts[parent] += 1
    runs: list[_Run] = []
    run_of: list[int] = []
    for row, parent in enumerate(parents):
        if parent >= 0 and parent == row - 1 and counts[parent] == 1:
            runs[-1].stop = row + 1
        else:
            above = run_of[parent] if parent >= 0 else -1
            over = runs[above].before + runs[above].stop - runs[above].start if above >= 0 else 0
            runs.append(_Run(row, row + 1, above, over))
        run_of.append(len(runs) - 1)
    return runs


def _joined(ranges: tuple[tuple[int, int], ...], last: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """With neighbouring ranges made one."""
    if ranges and ranges[-1][1] == last[0]:
        return (*ranges[:-1], (ranges[-1][0], last[1]))
    return (*ranges, last)
