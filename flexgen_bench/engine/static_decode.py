"""Decode passes of a resident micro-batch as work that can be recorded: all that changes from one pass to the next lies
in tensors that stay where they are.

N sequences, H query heads, G KV heads, D head dim, T places for tokens, a whole number of ``REACH`` of them. A graph
reads all T of them and masks those that are not there yet; beyond them it is another graph's turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexgen_bench.engine.cache import KVCache, slots_of
from flexgen_bench.engine.graphs import Graphs, Work
from flexgen_bench.engine.layers import Layer
from flexgen_bench.engine.resident_cache import attended
from flexgen_bench.kernels.decode import contiguous
from flexgen_bench.schedule.micro_batch import MicroBatch, Part
from flexgen_bench.schedule.sequence_group import SequenceGroup

REACH = 64


def reach(part: Part) -> int:
    """Places of a part's cache that a graph looks at, its new token among them."""
    layout = part.group.layouts[part.home]
    needed = layout.prompt_tokens + part.token
    return min(layout.tokens, -(-needed // REACH) * REACH)


@dataclass(frozen=True)
class StaticRun:
    """Sequences that are neighbours. keys, values: by unit, (N, G, T, D); base: what is added to scores of places that
    hold a token, (1 or N, 1, 1, T)."""

    part: int
    rows: slice
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    new: Tensor  # (L, 2, N, G, T, D)
    base: Tensor
    is_padded: bool


class StaticDecode:
    """A shape of micro-batch: which sequences lie where. The first pass that it is used for is issued as it is and
    makes the tensors that stay; later ones are recorded, piece by piece, and launched.

    SUMS: how many tensors of sums are watched in a pass: of all layers, and of the head.

    state: position of every sequence's token, then the place of the new token in each run, both less one: a pass begins
    with counting on.
    """

    SUMS = 2

    def __init__(
        self, micro_batch: MicroBatch, cache: KVCache, graphs: Graphs, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._cache, self._graphs, self._device = cache, graphs, device
        self._replays: dict[object, Work] = {}
        self._kept: dict[str, Tensor] = {}
        self._runs: list[StaticRun] = []
        self._records = False
        self._bound: list[tuple[SequenceGroup, int]] = []
        self.units: list[int] = []
        for part in micro_batch.kv_parts:
            self._add_runs(part, dtype)
        self._state = torch.zeros(micro_batch.rows + len(self._runs), dtype=torch.int64, device=device)
        self._rows = micro_batch.rows
        longest = max(run.base.shape[-1] for run in self._runs)
        self._places = torch.arange(longest, device=device)
        self.angles: Any = None
        self.where: slice | Tensor | None = None  # its tokens, in their home

    def _add_runs(self, part: Part, dtype: torch.dtype) -> None:
        layers = self._cache.all_layers(part, part.tier)
        assert layers is not None, "asked before"
        (stored,), self.units = layers
        tokens, padding, row = reach(part), self._cache.padding(part, self._device), part.row
        for start, stop in contiguous(slots_of(part)):
            own = stored[:, :, start:stop, :, :tokens]
            keys, values = own[:, 0].unbind(0), own[:, 1].unbind(0)
            count = stop - start
            base = torch.zeros(1 if padding is None else count, 1, 1, tokens, dtype=dtype, device=self._device)
            self._runs.append(
                StaticRun(
                    part.index,
                    slice(row, row + count),
                    dict(zip(self.units, keys, strict=True)),
                    dict(zip(self.units, values, strict=True)),
                    own,
                    base,
                    padding is not None,
                )
            )
            row += count

    def bind(self, micro_batch: MicroBatch, positions: Tensor, to_device: Callable[[Tensor], Tensor]) -> None:
        """Let the next pass be this micro-batch's. positions: (N,), on the host; to_device: copies without waiting."""
        now = [(member.group, member.token) for member in micro_batch.members]
        before = [(group, token + 1) for group, token in self._bound]
        self._bound = now
        if [(g.index, n) for g, n in now] == [(g.index, n) for g, n in before]:
            return  # counts on by itself
        parts = micro_batch.kv_parts
        cursors = [
            parts[r.part].group.layouts[parts[r.part].home].prompt_tokens + parts[r.part].token for r in self._runs
        ]
        self._state.copy_(to_device(torch.cat((positions, torch.tensor(cursors) - 1)) - 1))
        for run in self._runs:
            if run.is_padded:
                part = parts[run.part]
                padding = self._cache.padding(part, self._device)
                assert padding is not None
                first = slots_of(part)[run.rows.start - part.row]
                mask = padding.mask[first : first + run.base.shape[0], None, None, :]
                run.base.zero_()[..., : mask.shape[-1]].masked_fill_(~mask, float("-inf"))

    def run(self, name: object, work: Work) -> None:
        """Do a piece of a pass: recorded, if it was before or can be now."""
        replay = self._replays.get(name)
        if replay is None and self._records and self._graphs.is_on:
            replay = self._graphs.record(work)
            if replay is not None:
                self._replays[name] = replay
        if replay is None:
            work()
            return
        replay()
        self._graphs.replayed += 1

    def end_pass(self) -> None:
        """All pieces of a pass were done once: their tensors are there."""
        self._records = True

    def keep(self, name: str, value: Tensor) -> Tensor:
        """The value, where it stays from pass to pass."""
        kept = self._kept.get(name)
        if kept is None:
            kept = self._kept[name] = torch.empty_like(value, memory_format=torch.contiguous_format)
        return kept.copy_(value)

    def kept(self, name: str) -> Tensor:
        """What was kept under this name last."""
        return self._kept[name]

    # Pieces

    @property
    def positions(self) -> Tensor:
        """(N,) of the tokens of this pass."""
        return self._state[: self._rows]

    def count_on(self) -> None:
        """The first piece: positions and places of this pass, and what every layer may look at."""
        self._state.add_(1)
        for number, run in enumerate(self._runs):
            beyond = self._places[: run.base.shape[-1]] > self._cursor(number)
            self.keep(f"mask {number}", run.base.masked_fill(beyond, float("-inf")))

    def keep_angles(self, angles: Sequence[tuple[Tensor, Tensor]]) -> None:
        """cos and sin of each of the decoder's rotaries, for all layers."""
        self.angles = tuple(
            (self.keep(f"cos {number}", cos), self.keep(f"sin {number}", sin))
            for number, (cos, sin) in enumerate(angles)
        )

    def layer(self, unit: int, layer: Layer, x: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
        """Hidden states (N, hidden) after a layer; its new keys and values are in the cache then."""
        q, k, v = layer.project(x, self.angles)
        outs = [self._attend(number, unit, q, k, v, scale, sinks) for number in range(len(self._runs))]
        made: Tensor = layer.output(x, outs[0] if len(outs) == 1 else torch.cat(outs))
        return made

    def new_sums(self) -> Tensor:
        """(L, 2) float32: of each layer's new keys and values, finite only if all of them are."""
        sums = [
            run.new.index_select(4, self._cursor(number)).flatten(2).sum(dim=2, dtype=torch.float32)
            for number, run in enumerate(self._runs)
        ]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)

    def _cursor(self, number: int) -> Tensor:
        """(1,) the place of the new token in a run."""
        return self._state[self._rows + number : self._rows + number + 1]

    def _attend(
        self, number: int, unit: int, q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None
    ) -> Tensor:
        """As ``resident_cache.Attention``, over all places."""
        run, cursor = self._runs[number], self._cursor(number)
        keys, values, rows = run.keys[unit], run.values[unit], run.rows
        keys.index_copy_(2, cursor, k[rows].unsqueeze(2))
        values.index_copy_(2, cursor, v[rows].unsqueeze(2))
        return attended(q[rows], keys, values, self.kept(f"mask {number}"), scale, sinks)
