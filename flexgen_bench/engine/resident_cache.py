"""The cache of a resident micro-batch as one pass sees it: for every layer, where the new token goes and what it
attends to.

S sequences of a run, H query heads, G KV heads, D head dim, L layers, T cached tokens with the new one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from flexgen_bench.core.compression import Compression
from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.cache import KVCache, slots_of
from flexgen_bench.kernels.attention import Padding
from flexgen_bench.kernels.decode import contiguous
from flexgen_bench.kernels.packed_cache import PackedKernels, packed_kernels
from flexgen_bench.memory.kv_cache import KVForm, Stored
from flexgen_bench.schedule.micro_batch import MicroBatch, Part
from flexgen_bench.schedule.steps import Step

# A ring's runs are of equally long sequences. With so many to one of neighbours of any lengths, attention that knows of
# lengths takes fewer operators.
MOST_RUNS = 3


@dataclass(frozen=True)
class Run:
    """Sequences that are neighbours in the micro-batch and in a region. rows: theirs in the micro-batch; units: layers
    whose caches are alike; stored: the caches of these layers, (L, 2, S, G, T, ...) each; newest: where in T the new
    token goes; mask (S, 1, 1, T): minus infinity where there is no token, zero elsewhere; None if there is one
    everywhere."""

    rows: slice
    units: tuple[int, ...]
    stored: Stored
    newest: int
    mask: Tensor | None


class ResidentCache:
    """All runs of a micro-batch, those of the same layers one after the other. units: the layers, in the order in which
    the runs have them. is_split: there are many runs where sequences of any lengths would be one."""

    def __init__(self, runs: Sequence[Run], units: Sequence[int], is_split: bool) -> None:
        self.runs, self.units, self._is_split = runs, units, is_split

    @staticmethod
    def of(
        cache: KVCache,
        micro_batch: MicroBatch,
        tier: Tier,
        rings: Iterable[int | None],
        device: torch.device,
        dtype: torch.dtype,
    ) -> ResidentCache | None:
        """rings: what caches of layers on the tier keep, a window's tokens or (None) all. None if the cache does not
        lie in one piece per layer."""
        runs: list[Run] = []
        units: list[int] = []
        is_split = False
        for ring in rings:
            for part in micro_batch.kv_parts:
                layers = cache.all_layers(part, tier, ring)
                if layers is None:
                    return None
                if ring is None:
                    runs += _runs(part, *layers, cache.padding(part, device), dtype)
                else:
                    own = list(_ring_runs(part, *layers, part.layout(ring).tokens))
                    is_split |= len(own) > MOST_RUNS * len(contiguous(slots_of(part)))
                    runs += own
            units += runs[-1].units
        return ResidentCache(runs, units, is_split)

    def attention(self, form: KVForm, x: Tensor, scale: float) -> Attend | None:
        """Append and attend in a few operators per layer, for queries with the type of x and where it is; None if there
        are no kernels there for such a cache."""
        if self._is_split:
            return None
        if form.compression is None:
            return Attention(self, scale)
        kernels = packed_kernels(x.device, form.compression, x.dtype)
        return None if kernels is None else PackedAttention(self, kernels, form.compression, scale)

    def new_sums(self) -> Tensor:
        """(L, 2) float32: sums over the new token's keys and values, finite only if all of them are. Of a compressed
        cache: of its parameters, which ``PackedKernels`` make NaN where a group is not finite."""
        sums: dict[tuple[int, ...], list[Tensor]] = {}
        for run in self.runs:
            newest = run.stored[-1][:, :, :, :, run.newest]
            sums.setdefault(run.units, []).append(newest.flatten(2).sum(dim=2, dtype=torch.float32))
        alike = [of_runs[0] if len(of_runs) == 1 else torch.stack(of_runs).sum(0) for of_runs in sums.values()]
        return alike[0] if len(alike) == 1 else torch.cat(alike)


def _runs(
    part: Part, stored: Stored, units: Sequence[int], padding: Padding | None, dtype: torch.dtype
) -> Iterator[Run]:
    """Of layers that keep every token: the new one is the last of all."""
    prompt, row = part.layout().prompt_tokens, part.row
    tokens = prompt + part.token
    for start, stop in contiguous(slots_of(part)):
        mask = None
        if padding is not None:
            mask = torch.zeros(stop - start, 1, 1, tokens, dtype=dtype, device=padding.mask.device)
            empty = ~padding.mask[start:stop, None, None, :]
            mask[..., :prompt].masked_fill_(empty, float("-inf"))
        own = tuple(t[:, :, start:stop, :, :tokens] for t in stored)
        yield Run(slice(row, row + stop - start), tuple(units), own, tokens - 1, mask)
        row += stop - start


def _ring_runs(part: Part, stored: Stored, units: Sequence[int], slots: int) -> Iterator[Run]:
    """Of layers that keep a window's tokens: sequences that are equally long have the new one in the same slot, and all
    slots in use, or as many as there are tokens."""
    row = part.row
    for position, run in groupby(part.positions):
        places = slots_of(part)[row - part.row :][: len(list(run))]
        for start, stop in contiguous(places):
            own = tuple(t[:, :, start:stop, :, : min(position + 1, slots)] for t in stored)
            yield Run(slice(row, row + stop - start), tuple(units), own, position % slots, None)
            row += stop - start


# (step, q (S, H, D), k and v (S, G, D)) -> (S, H * D); k and v are appended to the cache.
Attend = Callable[[Step, Tensor, Tensor, Tensor], Tensor]
# What a run's attention needs in one layer.
View = TypeVar("View")


class _ByRuns(ABC, Generic[View]):
    """Attention of one run after the other. Nearly always there is one."""

    def __init__(self, cache: ResidentCache, views: Callable[[Run], Sequence[View]]) -> None:
        self._of: dict[int, list[tuple[slice, View]]] = {unit: [] for unit in cache.units}
        for run in cache.runs:
            for unit, view in zip(run.units, views(run), strict=True):
                self._of[unit].append((run.rows, view))

    def __call__(self, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (S, H, D), k and v (S, G, D) -> (S, H * D)."""
        views = self._of[step.unit]
        if len(views) == 1:
            return self._attend(views[0][1], q, k, v)
        return torch.cat([self._attend(view, q[rows], k[rows], v[rows]) for rows, view in views])

    @abstractmethod
    def _attend(self, view: View, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of one run."""


# Places of the new key and value (S, G, D), keys and values (S, G, T, D), the mask.
_Plain = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


class Attention(_ByRuns[_Plain]):
    """Decode attention with torch's fused kernel. Query heads that share a KV head are that head's queries, so no
    kernel has to know of grouped heads; a new token sees all that is there."""

    def __init__(self, cache: ResidentCache, scale: float) -> None:
        super().__init__(cache, _plain_views)
        self._scale = scale

    def _attend(self, view: _Plain, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new_k, new_v, keys, values, mask = view
        new_k.copy_(k)
        new_v.copy_(v)
        sequences, groups, _, dim = keys.shape
        out = F.scaled_dot_product_attention(q.view(sequences, groups, -1, dim), keys, values, mask, scale=self._scale)
        return out.reshape(sequences, -1)


def _plain_views(run: Run) -> list[_Plain]:
    """By layer. A few operators in all, however many layers there are."""
    (stored,) = run.stored
    keys, values = stored[:, 0], stored[:, 1]
    new_keys, new_values = keys[:, :, :, run.newest], values[:, :, :, run.newest]
    by_layer = zip(new_keys.unbind(0), new_values.unbind(0), keys.unbind(0), values.unbind(0), strict=True)
    return [(*four, run.mask) for four in by_layer]


# Places of the new codes and parameters (2, S, G, ...), codes and parameters (2, S, G, T, ...), the mask.
_Packed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


class PackedAttention(_ByRuns[_Packed]):
    """Decode attention over a compressed cache with kernels that read it as it is."""

    def __init__(self, cache: ResidentCache, kernels: PackedKernels, compression: Compression, scale: float) -> None:
        super().__init__(cache, _packed_views)
        self._append, self._over = kernels
        self._compression, self._scale = compression, scale

    def _attend(self, view: _Packed, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        new_codes, new_params, codes, params, mask = view
        self._append(k, v, new_codes, new_params, self._compression)
        return self._over(q, codes, params, mask, self._scale, self._compression)


def _packed_views(run: Run) -> list[_Packed]:
    codes, params = run.stored
    by_layer = zip(
        codes[:, :, :, :, run.newest].unbind(0),
        params[:, :, :, :, run.newest].unbind(0),
        codes.unbind(0),
        params.unbind(0),
        strict=True,
    )
    return [(*four, run.mask) for four in by_layer]
