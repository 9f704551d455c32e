"""How the keys and values of one span lie in their home."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flexgen_bench.core.units import PAGE, aligned


@dataclass(frozen=True)
class KVLayout:
    """One span's region per layer: a first segment, then tail segments.

    Each segment is (2, sequences, kv_heads, tokens, ...), contiguous, so a prefix of the region is one transfer; the
    first segment holds ``prompt_tokens`` per sequence (the prompt's), a tail segment ``segment_tokens`` generated ones.
    Segments start at multiples of ``align`` bytes, so that direct I/O can address them.

    is_joined: of a cache that never moves, prompt and generated tokens are neighbours, (2, sequences, kv_heads, P +
    new_tokens, ...), so that attention reads them as one tensor. It takes no more than the two segments would, which is
    what it is given.

    ring, longest: of a layer with a window, whose cache keeps the window's tokens alone: the token at position p of its
    sequence lies in slot ``p % ring``, where the token was that has left the window. The segments are of slots then,
    whatever is in them; ``longest``: tokens of the longest prompt. None: every token is kept.
    """

    sequences: int
    prompt_tokens: int
    new_tokens: int
    segment_tokens: int
    token_bytes: int  # K and V of one token of one sequence in one layer, as stored
    align: int = PAGE
    is_joined: bool = False
    ring: int | None = None
    longest: int = 0

    @property
    def tokens(self) -> int:
        """Places for tokens of each sequence."""
        return self.prompt_tokens + self.new_tokens

    @property
    def filled_by_prompts(self) -> int:
        """Places that are in use when the longest prompt is there."""
        return self.prompt_tokens if self.ring is None else min(self.longest, self.tokens)

    @property
    def first_bytes(self) -> int:
        return aligned(self.sequences * self.prompt_tokens * self.token_bytes, self.align)

    @property
    def prompt_bytes(self) -> int:
        """Of the prefix of the region that holds the prompts."""
        return self.prefix_bytes(self.used_segments(0))

    @property
    def segment_bytes(self) -> int:
        return aligned(self.sequences * self.segment_tokens * self.token_bytes, self.align)

    @property
    def tail_bytes(self) -> int:
        """Of a cache on disk: of the unfinished segment, in host memory."""
        return self.segment_bytes

    @property
    def num_segments(self) -> int:
        return -(-self.new_tokens // self.segment_tokens) if self.new_tokens else 0

    @property
    def region_bytes(self) -> int:
        return self.first_bytes + self.num_segments * self.segment_bytes

    def prefix_bytes(self, segments: int) -> int:
        """Bytes of the first segment and the first ``segments`` tail segments."""
        return self.first_bytes + segments * self.segment_bytes

    def moved_bytes(self, token: int) -> int:
        """Of the prefix that is moved for the ``token``-th new token (from 1). Of a ring, the segment that the token
        goes to is among it: prompts of other lengths are somewhere else in it."""
        return self.prefix_bytes(self.used_segments(token - 1 if self.ring is None else token))

    @property
    def moved_region_bytes(self) -> int:
        """The most that ``moved_bytes`` says."""
        return self.region_bytes

    def read_bytes(self, token: int) -> int:
        """What of a cache on disk is read for the ``token``-th new token."""
        return self.prefix_bytes(self.full_segments(token - 1))

    def segment_offset(self, number: int) -> int:
        """Where in the region the ``number``-th finished segment of generated tokens goes (from 0)."""
        return self.prefix_bytes(number)

    def newest_slot(self, position: int) -> int:
        """Of a ring: which slot, of those that attention reads, holds the token at this position, the last one."""
        assert self.ring is not None, self
        return position % self.ring

    def filled(self, tokens: int) -> int:
        """Of a ring: slots in use, by the longest sequence, once ``tokens`` new tokens are stored."""
        return min(self.longest + tokens, self.tokens)

    def full_segments(self, tokens: int) -> int:
        """Tail segments that are complete once ``tokens`` new tokens are stored."""
        return tokens // self.segment_tokens

    def used_segments(self, tokens: int) -> int:
        """Tail segments that hold something once ``tokens`` new tokens are stored."""
        if self.ring is not None:
            tokens = max(0, self.filled(tokens) - self.prompt_tokens)
        return -(-tokens // self.segment_tokens)

    def slots(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Of a ring, where tokens ``first .. last-1`` of a sequence lie, no more of them than it has slots: in their
        order, ranges of slots, each in one segment (0: the first one; then tail segments): segment, start, stop."""
        assert self.ring is not None, self
        assert last - first <= self.tokens, (self, first, last)
        while first < last:
            segment, place = self.slot(first)
            room = (self.segment_tokens if segment else self.prompt_tokens) - place
            count = min(last - first, room, self.tokens - first % self.ring)
            yield segment, place, place + count
            first += count

    def slot(self, position: int) -> tuple[int, int]:
        """Of a ring: segment and place in it of the token at a position of its sequence."""
        assert self.ring is not None, self
        slot = position % self.ring
        if slot < self.prompt_tokens:
            return 0, slot
        segment, place = divmod(slot - self.prompt_tokens, self.segment_tokens)
        return 1 + segment, place


def ring_layout(
    sequences: int, window: int, longest: int, new_tokens: int, segment: int | None, token_bytes: int
) -> KVLayout:
    """The cache of a window's tokens, or of all that there will be if they are fewer. segment: slots of a segment where
    the cache is moved, so that no more of a ring is moved than is in use; None: one piece, which is read where it
    lies."""
    slots = min(window, longest + new_tokens)
    first = slots if segment is None else min(segment, slots)
    return KVLayout(
        sequences,
        prompt_tokens=first,
        new_tokens=slots - first,
        segment_tokens=first,
        token_bytes=token_bytes,
        is_joined=segment is None,
        ring=window,
        longest=longest,
    )
