"""The cache of a layer with a window, of which only the window's tokens are kept: a ring of slots per sequence.

Keys are rotated before they are stored, so a slot's place says nothing that attention has to know: it reads all slots
that hold a token, in any order and without a mask. Each sequence's tokens lie by their own positions
(``schedule.kv_layout.KVLayout.slots``), whatever the lengths of those beside it.

S sequences, G KV heads, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flexgen_bench.memory.kv_cache import KVForm, KVRegion, Segment, Stored
from flexgen_bench.schedule.kv_layout import KVLayout


class RingRegion(KVRegion):
    """Views into the bytes of a ring (or of a prefix of it), wherever they lie."""

    def __init__(self, layout: KVLayout, form: KVForm) -> None:
        super().__init__(layout, form)
        # Of the tokens that are appended now, by where their keys and values are: see _groups.
        self._last: tuple[object, list[_Group]] | None = None

    def segments(self, raw: Tensor, tokens: int) -> list[Segment]:
        """Every slot that may hold something once ``tokens`` new tokens are stored. Padding says which do."""
        layout = self.layout
        left, found = layout.filled(tokens), []
        for segment in range(1 + layout.used_segments(tokens)):
            stored = self._segment(raw, segment)
            used = min(left, stored[0].shape[3])
            found.append(self.first_tokens(stored, used))
            left -= used
        return found

    def recent(self, raw: Tensor, first: int, last: int) -> Stored:
        """(2, S, G, last - first, ...): tokens ``first .. last-1`` of every sequence, which have not been overwritten.
        Copied, but where they lie together."""
        pieces = [
            tuple(t[:, :, :, a:b] for t in self._segment(raw, segment))
            for segment, a, b in self.layout.slots(first, last)
        ]
        return pieces[0] if len(pieces) == 1 else tuple(torch.cat(parts, dim=3) for parts in zip(*pieces, strict=True))

    def put_prompt(self, raw: Tensor, slot: int, first: int, kv: Sequence[Stored], length: int) -> None:
        last = first + kv[0][0].shape[0]
        for targets, rows in self._slots_of(raw, first, kv):
            for target, k, v in zip(targets, *rows, strict=True):
                target[0, slot], target[1, slot] = k.transpose(0, 1), v.transpose(0, 1)
        if last == length < self.layout.filled_by_prompts:  # multiplied by weight zero: it must not hold NaN
            for segment, a, b in self.layout.slots(length, self.layout.filled_by_prompts):
                for target in self._segment(raw, segment):
                    target[:, slot, :, a:b] = 0

    def put_shared(self, raw: Tensor, first: int, kv: Sequence[Stored]) -> None:
        for targets, rows in self._slots_of(raw, first, kv):
            for target, k, v in zip(targets, *rows, strict=True):
                target[0], target[1] = k.transpose(0, 1), v.transpose(0, 1)

    def put_prompts(self, raw: Tensor, first: int, kv: Sequence[Stored]) -> None:
        sequences = self.layout.sequences
        split = [tuple(t.view(sequences, -1, *t.shape[1:]).transpose(0, 1) for t in stored) for stored in kv]
        for targets, rows in self._slots_of(raw, first, split):
            for target, k, v in zip(targets, *rows, strict=True):
                for part, x in enumerate((k, v)):  # (T, S, G, ...) -> (S, G, T, ...)
                    target[part] = x.transpose(0, 1).transpose(1, 2)

    def append_at(
        self, raw: Tensor, positions: Sequence[int], token: int, slots: Sequence[int], new: Sequence[Stored]
    ) -> None:
        """Write the ``token``-th new token of the sequences in these places, which is at these positions of theirs: K
        and V, (S', G, ...) each. A slot that is used for the first time, by the longest prompt's sequence, is zeroed
        for the others: it is multiplied by weight zero until they come to it, and must not hold NaN."""
        layout = self.layout
        newest = layout.longest + token - 1
        if newest < layout.tokens and any(position != newest for position in positions):
            segment, place = layout.slot(newest)
            for target in self._segment(raw, segment):
                target[:, :, :, place] = 0
        for group in self._groups(positions, slots, new[0][0].device):
            for target, k, v in zip(self._segment(raw, group.segment), *new, strict=True):
                for part, x in enumerate((k, v)):
                    target[part][group.at] = x if group.rows is None else x[group.rows]

    def fed(self, raw: Tensor, slot: int, prompt: int, new: int) -> Stored:
        """Of what one sequence has in the cache, the window's tokens in their order: (2, G, tokens, ...)."""
        last = prompt + new
        recent = self.recent(raw, max(0, last - self.layout.tokens), last)
        return tuple(t[:, slot].clone() for t in recent)

    def put_kept(self, raw: Tensor, slot: int, kept: Stored, first: int) -> None:
        for targets, rows in self._slots_of(raw, first, (tuple(t.transpose(1, 2).transpose(0, 1) for t in kept),)):
            for target, both in zip(targets, rows[0], strict=True):  # (T, 2, G, ...)
                target[:, slot] = both.transpose(0, 1).transpose(1, 2)

    def _slots_of(self, raw: Tensor, first: int, kv: Sequence[Stored]) -> Iterator[tuple[Stored, list[Stored]]]:
        """Rows (T, ...) of tokens from ``first`` on, taken apart by where they go: views (2, S, G, t, ...) of their
        slots, and the rows. Those that others of them would overwrite are left out."""
        count = kv[0][0].shape[0]
        row = max(0, count - self.layout.tokens)
        for segment, a, b in self.layout.slots(first + row, first + count):
            rows = [tuple(t[row : row + b - a] for t in stored) for stored in kv]
            yield tuple(t[:, :, :, a:b] for t in self._segment(raw, segment)), rows
            row += b - a

    def _segment(self, raw: Tensor, segment: int) -> Stored:
        return self.tail(raw, segment - 1) if segment else self.prompt(raw)

    def _groups(self, positions: Sequence[int], slots: Sequence[int], device: torch.device) -> list[_Group]:
        """The same in every layer of a pass, so kept from the first of them."""
        key, last = (tuple(positions), tuple(slots), device), self._last
        if last is None or last[0] != key:  # lanes of a cache that is moved append to different copies of it
            last = self._last = (key, list(self._grouped(positions, slots, device)))
        return last[1]

    def _grouped(self, positions: Sequence[int], slots: Sequence[int], device: torch.device) -> Iterator[_Group]:
        places = [self.layout.slot(position) for position in positions]
        if len(set(places)) == 1 and len(slots) == self.layout.sequences:
            yield _Group(places[0][0], (slice(None), slice(None), places[0][1]), None)
            return
        for segment in dict.fromkeys(segment for segment, _ in places):
            rows = [row for row, (of, _) in enumerate(places) if of == segment]
            sequences = _index([slots[row] for row in rows], device)
            at = (sequences, slice(None), _index([places[row][1] for row in rows], device))
            yield _Group(segment, at, None if len(rows) == len(places) else _index(rows, device))


class _Group:
    """New tokens that go to one segment. at: where in (S, G, T, ...), such that (S', G, ...) fits there; rows: which of
    the new ones they are, None: all."""

    def __init__(self, segment: int, at: tuple[slice | Tensor | int, ...], rows: Tensor | None) -> None:
        self.segment, self.at, self.rows = segment, at, rows


def _index(numbers: Sequence[int], device: torch.device) -> Tensor:
    index = torch.tensor(numbers)
    # From pinned memory: a GPU's stream would be waited for otherwise.
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index
