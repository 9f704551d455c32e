"""What is special about prompts: the positions of their rows, and their attention over themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from flexgen_bench.engine.cache import KVCache
from flexgen_bench.engine.resident_cache import SinksOf
from flexgen_bench.kernels.attention import chunk_attention, prefill_attention
from flexgen_bench.kernels.tree_attention import TreeMask, tree_attention
from flexgen_bench.memory.kv_cache import KVForm, Stored
from flexgen_bench.models.parts import Layer
from flexgen_bench.schedule.micro_batch import MicroBatch, Part
from flexgen_bench.schedule.prefix_tree import PrefixTree
from flexgen_bench.schedule.scheduled_job import ScheduledJob
from flexgen_bench.schedule.steps import Step


class Prompts:
    """Attention of prompts, whole ones and chunks. Every row sees what the cache holds of it, so that results do not
    depend on how prompts are cut into chunks.

    prefix tree: of a sequence of the job, how its rows hang together; None where each follows the one before it.
    value_share: of sparse attention, which only rows of prefix trees follow that stand for decoded tokens.
    """

    def __init__(
        self,
        job: ScheduledJob,
        cache: KVCache,
        form: KVForm,
        tree: Callable[[int], PrefixTree | None],
        layers: Sequence[Layer],
        value_share: float,
        sinks_of: SinksOf,
    ) -> None:
        self._job, self._cache, self._form, self._tree = job, cache, form, tree
        self._layers, self._value_share, self._sinks_of = layers, value_share, sinks_of
        self._masks: dict[int, TreeMask] = {}  # by sequence of the job

    def begin_pass(self) -> None:
        """The prompts of the last pass are done with."""
        self._masks.clear()

    def positions(self, micro_batch: MicroBatch) -> Tensor:
        """Position of every row in its sequence."""
        if not micro_batch.is_prefill:
            return torch.tensor([first for member in micro_batch.members for first, _ in member.ranges])
        row_positions = []
        for member in micro_batch.members:
            for sequence, (first, last) in zip(member.group.sequences, member.ranges, strict=True):
                tree = self._tree(sequence)
                if tree is None:
                    row_positions.append(torch.arange(first, last))
                else:
                    row_positions.append(torch.tensor(tree.positions[first:last], dtype=torch.long))
        return torch.cat(row_positions)

    def lengths(self, micro_batch: MicroBatch) -> Tensor:
        """Of every row: the tokens that its sequence has when the row is computed. All of a prompt's are there from its
        first chunk on; rows of prefix trees, whose sequences have several ends, count those up to their own."""
        positions = self.positions(micro_batch)
        if not micro_batch.is_prefill:
            return positions + 1
        row_lengths = []
        for member in micro_batch.members:
            group = member.group
            of = zip(group.sequences, group.prompt_lens, member.ranges, strict=True)
            for sequence, length, (first, last) in of:
                known = self._tree(sequence) is None
                row_lengths.append(torch.full((last - first,), length if known else 0))
        return torch.maximum(torch.cat(row_lengths), positions + 1)

    def attend(self, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, D), k and v (N, G, D) of all rows of the step's micro-batch -> (N, H * D)."""
        micro_batch, attention = step.micro_batch, self._layers[step.unit - 1].attention
        member, sinks = micro_batch.members[0], self._sinks_of(step)
        stored = (self._form.encode(k), self._form.encode(v))
        keeps = self._job.keep_kv or member.start > 0 or not member.is_last_chunk
        from_cache = member.start > 0 or member.group.shared > 0
        for part in micro_batch.kv_parts if keeps else ():
            # What a chunk overwrites in a ring is what it attends to.
            if not from_cache or self._cache.ring(step, part) is None:
                self._cache.keep_prompt(step, part, stored)
        if self._tree(member.group.sequences[0]) is not None:
            return self._attend_trees(step, q, stored)
        if not from_cache:
            lens = [last - first for first, last in member.ranges]
            keys, values = (self._form.decode(x) for x in stored)
            return prefill_attention(q, keys, values, lens, attention.scale, attention.mod, sinks)
        outs = []
        for part in micro_batch.kv_parts:
            ring = self._cache.ring(step, part)
            if ring is not None:
                outs.append(self._attend_in_ring(step, part, q, stored, ring))
                self._cache.keep_prompt(step, part, stored)
                continue
            ranges = member.ranges[part.span.start : part.span.stop]
            stop = max(last for _, last in ranges)
            keys, values = self._cache.prompt_so_far(step, part, stop)
            rows = q[part.row : part.stop]
            outs.append(chunk_attention(rows, keys, values, ranges, attention.scale, attention.mod, sinks))
        return _joined(outs)

    def _attend_in_ring(self, step: Step, part: Part, q: Tensor, stored: Sequence[Stored], ring: int) -> Tensor:
        """A chunk of a part's prompts over the window's tokens before it, and its own: what all prompts share, which is
        computed with the first, and theirs."""
        member, attention, sinks = part.member, self._layers[step.unit - 1].attention, self._sinks_of(step)
        since = max(0, member.start - ring + 1)
        before = self._cache.before(step, part, since, member.start) if since < member.start else ()
        same, own = (
            [self._form.decode(tuple(t[a:b] for t in x)).transpose(0, 1) for x in stored]  # (G, T, D)
            for a, b in ((0, member.shared_rows), (part.row, part.stop))
        )
        outs, row, sequence = [], 0, 0
        for (first, last), run in groupby(member.ranges[part.span.start : part.span.stop]):
            count, length = len(list(run)), last - first
            stop = row + count * length
            if length:
                pieces = [[x[sequence : sequence + count]] for x in before] or [[], []]
                for i, mine in enumerate(pieces):
                    if first > member.start:
                        mine.append(same[i].expand(count, *same[i].shape))
                    mine.append(own[i][:, row:stop].unflatten(1, (count, length)).transpose(0, 1))
                keys, values = (torch.cat(mine, dim=2) for mine in pieces)
                queries, ranges = q[part.row + row : part.row + stop], [(first - since, last - since)] * count
                outs.append(chunk_attention(queries, keys, values, ranges, attention.scale, attention.mod, sinks))
            row, sequence = stop, sequence + count
        return _joined(outs) if outs else q.new_empty(0, q.shape[1] * q.shape[2])

    def _attend_trees(self, step: Step, q: Tensor, stored: Sequence[Stored]) -> Tensor:
        """The rows of a chunk of each prefix tree over those of all its chunks so far."""
        member, outs, sinks = step.micro_batch.members[0], [], self._sinks_of(step)
        attention = self._layers[step.unit - 1].attention
        for part in step.micro_batch.kv_parts:
            span = part.span
            gathered: list[Tensor] = []
            if member.start:
                stop = max(last for _, last in member.ranges[span.start : span.stop])
                gathered = [x.transpose(1, 2) for x in self._cache.prompt_so_far(step, part, stop)]
            for place in range(span.start, span.stop):
                start, stop = member.offsets[place], member.offsets[place + 1]
                if start == stop:
                    continue
                if gathered:
                    keys, values = (x[place - span.start] for x in gathered)
                else:
                    keys, values = (self._form.decode(tuple(t[start:stop] for t in x)) for x in stored)
                mask = self._mask(member.group.sequences[place])
                outs.append(
                    tree_attention(
                        q[start:stop],
                        keys,
                        values,
                        mask,
                        member.start,
                        attention.scale,
                        self._value_share,
                        attention.mod,
                        sinks,
                    )
                )
        return _joined(outs)

    def _mask(self, sequence: int) -> TreeMask:
        """Who sees whom in a prefix tree: the same in every layer."""
        if sequence not in self._masks:
            tree = self._tree(sequence)
            assert tree is not None
            self._masks[sequence] = TreeMask(tree)
        return self._masks[sequence]


def _joined(outs: Sequence[Tensor]) -> Tensor:
    return outs[0] if len(outs) == 1 else torch.cat(list(outs))
