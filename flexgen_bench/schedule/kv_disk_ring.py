"""How the cache of a window's tokens lies on disk, where a piece is written once and as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_bench.core.units import aligned
from flexgen_bench.schedule.kv_layout import KVLayout


@dataclass(frozen=True)
class DiskRing(KVLayout):
    """Segments by time, the same for sequences of all lengths: what is written is a whole segment, and replaces the one
    whose tokens have left the window of all.

    Prompts end with the first slot of the first segment and go backwards from there, so they fill whole segments,
    newest first; a segment of generated tokens is stored newest first, too. From the newest segment on, in ascending
    order and around the end, slots are therefore in the order of their distance from the newest token, and those in
    use are the first ones, of every sequence. The unfinished segment is not among them: it is in host memory.
    """

    @property
    def segments(self) -> int:
        """With the unfinished one, which has a token at least, they hold the window."""
        return max(1, -(-(self._most - 1) // self.segment_tokens))

    @property
    def slots_on_disk(self) -> int:
        return self.segments * self.segment_tokens

    @property
    def region_bytes(self) -> int:
        return self.segments * self.segment_bytes

    @property
    def tail_tokens(self) -> int:
        """Of the unfinished segment; fewer than of the others, if it is never finished."""
        return max(1, min(self.segment_tokens, self.new_tokens))

    @property
    def tail_bytes(self) -> int:
        return aligned(self.sequences * self.tail_tokens * self.token_bytes, self.align)

    @property
    def moved_region_bytes(self) -> int:
        return self.region_bytes + self.tail_bytes

    @property
    def prompt_bytes(self) -> int:
        return self._prompt_segments * self.segment_bytes

    def filled(self, tokens: int) -> int:
        return min(self.longest + tokens, self._most)

    def newest_slot(self, position: int) -> int:
        return 0

    def segment_offset(self, number: int) -> int:
        return (self.segments - 1 - number) % self.segments * self.segment_bytes

    def order(self, token: int) -> list[int]:
        """Segments on disk from the newest on, when the ``token``-th new token is fed (from 1)."""
        newest = self.segments - self.full_segments(token - 1)
        return [(newest + i) % self.segments for i in range(self.segments)]

    def extents(self, token: int) -> list[tuple[int, int]]:
        """Bytes of the region that hold something then: ranges."""
        written = self.full_segments(token - 1)
        prompts = min(self._prompt_segments, max(0, self.segments - written))
        first = max(prompts, self.segments - written)
        ranges = [(0, self.segments)] if first == prompts else [(0, prompts), (first, self.segments)]
        return [(a * self.segment_bytes, b * self.segment_bytes) for a, b in ranges if a < b]

    def read_bytes(self, token: int) -> int:
        return sum(stop - start for start, stop in self.extents(token))

    def moved_bytes(self, token: int) -> int:
        unfinished = (token - 1) % self.segment_tokens > 0
        return self.read_bytes(token) + unfinished * self.tail_bytes

    @property
    def _prompt_segments(self) -> int:
        return -(-min(self.longest, self.slots_on_disk) // self.segment_tokens)

    @property
    def _most(self) -> int:
        """Tokens that are ever attended to at once."""
        assert self.ring is not None, self
        return min(self.ring, self.longest + self.new_tokens)
