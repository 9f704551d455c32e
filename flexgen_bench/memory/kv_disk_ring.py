"""Views into the cache of a window's tokens that lies on disk (``schedule/kv_disk_ring.py``): as prompts gather it, as
it was read, and its unfinished segment.

S sequences, G KV heads, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flexgen_bench.memory.kv_cache import KVForm, KVRegion, Segment, Stored
from flexgen_bench.schedule.kv_disk_ring import DiskRing


class DiskRingRegion(KVRegion):
    """Slots are in the order of their distance from a prompt's end, whatever its length, or from the last token of a
    segment. While prompts gather, tokens that are further away than there are slots lie where nearer ones will."""

    def __init__(self, layout: DiskRing, form: KVForm) -> None:
        super().__init__(layout, form)
        self.ring = layout

    def put_prompt(self, raw: Tensor, slot: int, first: int, kv: Sequence[Stored], length: int) -> None:
        count = kv[0][0].shape[0]
        last = first + count
        for a, b, segment, place in self._pieces(max(first, last - self.ring.slots_on_disk), last, length):
            rows = [tuple(t[a - first : b - first].flip(0).transpose(0, 1) for t in stored) for stored in kv]
            for target, k, v in zip(self._segment(raw, segment), *rows, strict=True):
                target[0, slot, :, place : place + b - a], target[1, slot, :, place : place + b - a] = k, v
        if last == length:  # multiplied by weight zero: it must not hold NaN
            filled = min(length, self.ring.slots_on_disk)
            for segment in range(self.ring.prompt_bytes // self.ring.segment_bytes):
                free = max(0, filled - segment * self.ring.segment_tokens)
                for target in self._segment(raw, segment):
                    target[:, slot, :, free:] = 0

    def recent(self, raw: Tensor, slot: int, first: int, last: int, length: int) -> Stored:
        """(2, G, last - first, ...): tokens ``first .. last-1`` of a prompt, which have not been overwritten."""
        pieces = [
            tuple(t[:, slot, :, place : place + b - a].flip(2) for t in self._segment(raw, segment))
            for a, b, segment, place in self._pieces(first, last, length)
        ]
        return tuple(torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True))

    def window(self, raw: Tensor, tail: Tensor, token: int) -> list[Segment]:
        """All that the ``token``-th new token attends to, itself among it, newest first: of the unfinished segment
        (``tail``) and of what was read."""
        size = self.ring.segment_tokens
        own = (token - 1) % size + 1
        found = [self.form.segment(tuple(t[:, :, :, self.ring.tail_tokens - own :] for t in self._tail(tail)))]
        left = self.ring.filled(token) - own
        for segment in self.ring.order(token):
            if left <= 0:
                break
            found.append(self.first_tokens(self._segment(raw, segment), min(size, left)))
            left -= size
        return found

    def append_loose(self, raw: Tensor, token: int, slots: Sequence[int], new: Sequence[Stored]) -> None:
        place = self.ring.tail_tokens - 1 - (token - 1) % self.ring.segment_tokens
        self._put(self._tail(raw), place, slots, new)

    def _tail(self, raw: Tensor) -> Stored:
        return self.form.views(raw, self.ring.sequences, self.ring.tail_tokens)

    def _segment(self, raw: Tensor, segment: int) -> Stored:
        return self.loose_tail(raw[segment * self.ring.segment_bytes :])

    def _pieces(self, first: int, last: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """Tokens ``first .. last-1`` of a prompt by segment: which of them, the segment, and the place of the last of
        these, behind which the others are."""
        while first < last:
            segment, place = divmod((length - 1 - first) % self.ring.slots_on_disk, self.ring.segment_tokens)
            stop = min(last, first + place + 1)
            yield first, stop, segment, place - (stop - 1 - first)
            first = stop
