"""How the keys and values of one span lie in their home."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_bench.core.units import PAGE, aligned


@dataclass(frozen=True)
class KVLayout:
    """One span's region per layer: a prompt segment, then tail segments.

    Each segment is (2, sequences, kv_heads, tokens, ...), contiguous, so a prefix of the region is one transfer; the
    prompt segment holds P tokens per sequence, a tail segment ``segment_tokens`` generated ones. Segments start at
    multiples of ``align`` bytes, so that direct I/O can address them.

    is_joined: of a cache that never moves, prompt and generated tokens are neighbours, (2, sequences, kv_heads, P +
    new_tokens, ...), so that attention reads them as one tensor. It takes no more than the two segments would, which is
    what it is given.
    """

    sequences: int
    prompt_tokens: int
    new_tokens: int
    segment_tokens: int
    token_bytes: int  # K and V of one token of one sequence in one layer, as stored
    align: int = PAGE
    is_joined: bool = False

    @property
    def tokens(self) -> int:
        """Of a joined region: places for tokens of each sequence."""
        return self.prompt_tokens + self.new_tokens

    @property
    def prompt_bytes(self) -> int:
        return aligned(self.sequences * self.prompt_tokens * self.token_bytes, self.align)

    @property
    def segment_bytes(self) -> int:
        return aligned(self.sequences * self.segment_tokens * self.token_bytes, self.align)

    @property
    def num_segments(self) -> int:
        return -(-self.new_tokens // self.segment_tokens) if self.new_tokens else 0

    @property
    def region_bytes(self) -> int:
        return self.prompt_bytes + self.num_segments * self.segment_bytes

    def prefix_bytes(self, segments: int) -> int:
        """Bytes of the prompt segment and the first ``segments`` tail segments."""
        return self.prompt_bytes + segments * self.segment_bytes

    def full_segments(self, tokens: int) -> int:
        """Tail segments that are complete once ``tokens`` new tokens are stored."""
        return tokens // self.segment_tokens

    def used_segments(self, tokens: int) -> int:
        return -(-tokens // self.segment_tokens)
