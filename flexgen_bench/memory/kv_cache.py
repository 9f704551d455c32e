"""Keys and values at home: one region per layer for each span of sequences, on one tier.

A region is laid out by ``schedule.job.KVLayout``: a prompt segment and tail segments, each
(2, S, G, T, D): K then V, S sequences, G KV heads, T tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexgen_bench.core.tiers import Tier
from flexgen_bench.memory.spill import SpillFile
from flexgen_bench.schedule.job import KVLayout

Segment = tuple[Tensor, Tensor]  # k, v: (S, G, T, D)


class KVRegion:
    """Views into the bytes of one region (or of a prefix of it), wherever they lie."""

    def __init__(
        self, layout: KVLayout, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self.layout = layout
        self._heads = num_kv_heads
        self._dim = head_dim
        self._dtype = dtype

    def prompt(self, raw: Tensor) -> Tensor:
        """(2, S, G, P, D) at the start of ``raw`` (uint8)."""
        return self._segment(raw, 0, self.layout.prompt_tokens)

    def tail(self, raw: Tensor, segment: int) -> Tensor:
        """(2, S, G, segment_tokens, D) of one tail segment of a region."""
        return self._segment(raw, self.layout.prefix_bytes(segment), self.layout.segment_tokens)

    def loose_tail(self, raw: Tensor) -> Tensor:
        """The same for a segment that lies by itself."""
        return self._segment(raw, 0, self.layout.segment_tokens)

    def segments(self, raw: Tensor, tokens: int) -> list[Segment]:
        """The prompt and the first ``tokens`` generated tokens, as (k, v) pairs."""
        found = [_pair(self.prompt(raw))]
        for number in range(self.layout.used_segments(tokens)):
            used = min(self.layout.segment_tokens, tokens - number * self.layout.segment_tokens)
            found.append(_pair(self.tail(raw, number)[:, :, :, :used]))
        return found

    def append(self, raw: Tensor, token: int, k: Tensor, v: Tensor) -> None:
        """Write the keys and values (S, G, D) of the ``token``-th generated token (from 1) into a region."""
        segment, place = divmod(token - 1, self.layout.segment_tokens)
        self._put(self.tail(raw, segment), place, k, v)

    def append_loose(self, raw: Tensor, token: int, k: Tensor, v: Tensor) -> None:
        """The same into the one segment that is kept by itself."""
        self._put(self.loose_tail(raw), (token - 1) % self.layout.segment_tokens, k, v)

    @staticmethod
    def _put(segment: Tensor, place: int, k: Tensor, v: Tensor) -> None:
        segment[0, :, :, place] = k
        segment[1, :, :, place] = v

    def _segment(self, raw: Tensor, offset: int, tokens: int) -> Tensor:
        size = self.layout.sequences * tokens * self.layout.token_bytes
        flat = raw[offset : offset + size].view(self._dtype)
        return flat.view(2, self.layout.sequences, self._heads, tokens, self._dim)


def _pair(segment: Tensor) -> Segment:
    return segment[0], segment[1]


class KVHome:
    """The regions of all layers of one span. On disk: an extent of the spill file, and one tail segment per
    layer in host memory until it is complete."""

    def __init__(
        self,
        tier: Tier,
        region: KVRegion,
        memory: Tensor | None,
        spill: SpillFile | None = None,
        spill_offset: int = 0,
        tails: Tensor | None = None,
    ) -> None:
        self.tier = tier
        self.region = region
        self._memory = memory
        self._spill = spill
        self._spill_offset = spill_offset
        self._tails = tails

    def raw(self, layer: int) -> Tensor:
        """The bytes of a layer's region, for homes in memory."""
        assert self._memory is not None
        size = self.region.layout.region_bytes
        return self._memory[layer * size : (layer + 1) * size]

    def loose(self, layer: int) -> Tensor:
        """The bytes of a layer's unfinished tail segment, for homes on disk."""
        assert self._tails is not None
        size = self.region.layout.segment_bytes
        return self._tails[layer * size : (layer + 1) * size]

    def read_prefix(self, layer: int, segments: int, into: Tensor) -> None:
        """Prompt segment and complete tail segments, disk -> ``into``."""
        assert self._spill is not None
        size = self.region.layout.prefix_bytes(segments)
        self._spill.read(self._base(layer), into[:size])

    def write_prompt(self, layer: int, data: Tensor) -> None:
        assert self._spill is not None
        self._spill.write(self._base(layer), data[: self.region.layout.prompt_bytes])

    def write_segment(self, layer: int, segment: int) -> None:
        """The finished tail segment, host memory -> disk."""
        assert self._spill is not None
        offset = self._base(layer) + self.region.layout.prefix_bytes(segment)
        self._spill.write(offset, self.loose(layer))

    def _base(self, layer: int) -> int:
        return self._spill_offset + layer * self.region.layout.region_bytes
