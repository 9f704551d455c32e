"""The cache of a resident micro-batch as one pass sees it: for every layer, where the new token goes and what it
attends to.

S sequences of a run, H query heads, G KV heads, D head dim, L layers, T cached tokens with the new one.
"""

from __future__ import annotations

import functools
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
from flexgen_bench.kernels.decode import contiguous
from flexgen_bench.kernels.packed_cache import PackedKernels, packed_kernels
from flexgen_bench.kernels.score_mod import softmax
from flexgen_bench.kernels.segments import Padding
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
    token goes; padding: which of the first slots in T hold a token; None if all do."""

    rows: slice
    units: tuple[int, ...]
    stored: Stored
    newest: int
    padding: Padding | None = None

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """(S, 1, 1, T): minus infinity where there is no token, zero elsewhere; None if there is one everywhere."""
        if self.padding is None:
            return None
        sequences, prompt = self.padding.mask.shape
        mask = torch.zeros(sequences, 1, 1, self.stored[0].shape[4], dtype=dtype, device=self.padding.mask.device)
        mask[..., :prompt].masked_fill_(~self.padding.mask[:, None, None, :], float("-inf"))
        return mask


class ResidentCache:
    """All runs of a micro-batch, those of the same layers one after the other. units: the layers, in the order in which
    the runs have them. is_split: there are many runs where sequences of any lengths would be one. has_sinks: of any
    layer."""

    def __init__(self, runs: Sequence[Run], units: Sequence[int], is_split: bool, has_sinks: bool) -> None:
        self.runs, self.units, self._is_split, self.has_sinks = runs, units, is_split, has_sinks

    @staticmethod
    def of(
        cache: KVCache,
        micro_batch: MicroBatch,
        tier: Tier,
        rings: Iterable[int | None],
        device: torch.device,
        has_sinks: bool = False,
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
                    runs += _runs(part, *layers, cache.padding(part, device))
                else:
                    own = list(_ring_runs(part, *layers, part.layout(ring).tokens))
                    is_split |= len(own) > MOST_RUNS * len(contiguous(slots_of(part)))
                    runs += own
            units += runs[-1].units
        return ResidentCache(runs, units, is_split, has_sinks)

    def attention(self, form: KVForm, x: Tensor, scale: float, sinks: SinksOf) -> Attend | None:
        """Append and attend in a few operators per layer, for queries with the type of x and where it is; None if there
        are no kernels there for such a cache."""
        if self._is_split:
            return None
        if form.compression is None:
            return Attention(self, scale, sinks)
        kernels = packed_kernels(x.device, form.compression, x.dtype)
        return None if kernels is None else PackedAttention(self, kernels, form.compression, x.dtype, scale, sinks)

    def new_sums(self) -> Tensor:
        """(L, 2) float32: sums over the new token's keys and values, finite only if all of them are. Of a compressed
        cache: of its parameters, which ``PackedKernels`` make NaN where a group is not finite."""
        sums: dict[tuple[int, ...], list[Tensor]] = {}
        for run in self.runs:
            newest = run.stored[-1][:, :, :, :, run.newest]
            sums.setdefault(run.units, []).append(newest.flatten(2).sum(dim=2, dtype=torch.float32))
        alike = [of_runs[0] if len(of_runs) == 1 else torch.stack(of_runs).sum(0) for of_runs in sums.values()]
        return alike[0] if len(alike) == 1 else torch.cat(alike)


def _runs(part: Part, stored: Stored, units: Sequence[int], padding: Padding | None) -> Iterator[Run]:
    """Of layers that keep every token: the new one is the last of all."""
    tokens, row = part.layout().prompt_tokens + part.token, part.row
    for start, stop in contiguous(slots_of(part)):
        own = tuple(t[:, :, start:stop, :, :tokens] for t in stored)
        present = padding and padding.part(start, stop)
        yield Run(slice(row, row + stop - start), tuple(units), own, tokens - 1, present)
        row += stop - start


def _ring_runs(part: Part, stored: Stored, units: Sequence[int], slots: int) -> Iterator[Run]:
    """Of layers that keep a window's tokens: sequences that are equally long have the new one in the same slot, and all
    slots in use, or as many as there are tokens."""
    row = part.row
    for position, run in groupby(part.positions):
        places = slots_of(part)[row - part.row :][: len(list(run))]
        for start, stop in contiguous(places):
            own = tuple(t[:, :, start:stop, :, : min(position + 1, slots)] for t in stored)
            yield Run(slice(row, row + stop - start), tuple(units), own, position % slots)
            row += stop - start


# (step, q (S, H, D), k and v (S, G, D)) -> (S, H * D); k and v are appended to the cache.
Attend = Callable[[Step, Tensor, Tensor, Tensor], Tensor]
# The attention sinks of a step's layer (H,) float32, where the step attends; None: it has none.
SinksOf = Callable[[Step], Tensor | None]
# What a run's attention needs in one layer.
View = TypeVar("View")


class ByRuns(ABC, Generic[View]):
    """Attention of one run after the other. Nearly always there is one."""

    def __init__(self, cache: ResidentCache, views: Callable[[Run], Sequence[View]], sinks: SinksOf) -> None:
        self._sinks = sinks if cache.has_sinks else None
        self._of: dict[int, list[tuple[slice, View]]] = {unit: [] for unit in cache.units}
        for run in cache.runs:
            for unit, view in zip(run.units, views(run), strict=True):
                self._of[unit].append((run.rows, view))

    def __call__(self, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (S, H, D), k and v (S, G, D) -> (S, H * D)."""
        views, sinks = self._of[step.unit], self._sinks and self._sinks(step)
        if len(views) == 1:
            return self._attend(views[0][1], q, k, v, sinks)
        return torch.cat([self._attend(view, q[rows], k[rows], v[rows], sinks) for rows, view in views])

    @abstractmethod
    def _attend(self, view: View, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        """Of one run."""


def attended(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None
) -> Tensor:
    """q (S, H, D), keys and values (S, G, T, D), mask (S, 1, 1, T), added to scores, sinks (H,) -> (S, H * D): with
    torch's fused kernel, or in a few operators with sinks, which it knows nothing of. Query heads that share a KV head
    are that head's queries, so no kernel has to know of grouped heads."""
    sequences, groups, _, dim = keys.shape
    queries = q.view(sequences, groups, -1, dim)
    if sinks is None:
        out = F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale)
    else:
        scores = torch.matmul(queries * scale, keys.transpose(2, 3))
        scores = scores if mask is None else scores.add_(mask)
        weights = softmax(scores.view(sequences, -1, 1, scores.shape[-1]), sinks).to(q.dtype)
        out = torch.matmul(weights.view(scores.shape), values)
    return out.reshape(sequences, -1)


# Places of the new key and value (S, G, D), keys and values (S, G, T, D), the mask.
_Plain = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


class Attention(ByRuns[_Plain]):
    """Decode attention over plain numbers (``attended``); a new token sees all that is there."""

    def __init__(self, cache: ResidentCache, scale: float, sinks: SinksOf) -> None:
        super().__init__(cache, _plain_views, sinks)
        self._scale = scale

    def _attend(self, view: _Plain, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        new_k, new_v, keys, values, mask = view
        new_k.copy_(k)
        new_v.copy_(v)
        return attended(q, keys, values, mask, self._scale, sinks)


def _plain_views(run: Run) -> list[_Plain]:
    """By layer. A few operators in all, however many layers there are."""
    (stored,) = run.stored
    keys, values = stored[:, 0], stored[:, 1]
    new_keys, new_values = keys[:, :, :, run.newest], values[:, :, :, run.newest]
    by_layer = zip(new_keys.unbind(0), new_values.unbind(0), keys.unbind(0), values.unbind(0), strict=True)
    mask = run.mask(keys.dtype)
    return [(*four, mask) for four in by_layer]


# Places of the new codes and parameters (2, S, G, ...), codes and parameters (2, S, G, T, ...), the mask.
_Packed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


class PackedAttention(ByRuns[_Packed]):
    """Decode attention over a compressed cache with kernels that read it as it is."""

    def __init__(
        self,
        cache: ResidentCache,
        kernels: PackedKernels,
        compression: Compression,
        dtype: torch.dtype,
        scale: float,
        sinks: SinksOf,
    ) -> None:
        super().__init__(cache, functools.partial(_packed_views, dtype=dtype), sinks)
        self._append, self._over = kernels
        self._compression, self._scale = compression, scale

    def _attend(self, view: _Packed, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        new_codes, new_params, codes, params, mask = view
        self._append(k, v, new_codes, new_params, self._compression)
        return self._over(q, codes, params, mask, sinks, self._scale, self._compression)


def _packed_views(run: Run, dtype: torch.dtype) -> list[_Packed]:
    codes, params = run.stored
    by_layer = zip(
        codes[:, :, :, :, run.newest].unbind(0),
        params[:, :, :, :, run.newest].unbind(0),
        codes.unbind(0),
        params.unbind(0),
        strict=True,
    )
    mask = run.mask(dtype)
    return [(*four, mask) for four in by_layer]
