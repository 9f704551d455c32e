"""The form of keys and values in memory: plain or compressed, in segments of a region.

A region is laid out by ``schedule.kv_layout.KVLayout``: a prompt segment and tail segments, each of shape
(2, S, G, T, ...): K then V, S sequences, G KV heads, T tokens. Plain, the last dimension is D, the head dim.
Compressed, a segment is its codes (2, S, G, T, C) followed by its group parameters (2, S, G, T, groups, 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexgen_bench.core.compression import Compression
from flexgen_bench.kernels.attention import PackedSegment, PlainSegment
from flexgen_bench.kernels.quantization import dequantize, quantize
from flexgen_bench.schedule.kv_layout import KVLayout

Segment = PlainSegment | PackedSegment
# Tensors that together hold keys or values: one (plain), or codes and group parameters.
Stored = tuple[Tensor, ...]


class KVForm:
    """How one token's keys or values (..., D) are stored, and how they are read back."""

    def __init__(self, heads: int, head_dim: int, dtype: torch.dtype, compression: Compression | None) -> None:
        self.heads, self.head_dim, self.dtype = heads, head_dim, dtype
        self.compression = compression

    def encode(self, x: Tensor) -> Stored:
        """(..., D) -> what is stored of it."""
        return (x,) if self.compression is None else quantize(x, self.compression)

    def decode(self, stored: Stored) -> Tensor:
        """What attention sees: (..., D) in the model's dtype."""
        if self.compression is None:
            return stored[0]
        return dequantize(stored[0], stored[1], self.head_dim, self.compression, self.dtype)

    def views(self, raw: Tensor, sequences: int, tokens: int) -> Stored:
        """Bytes (..., bytes) of one segment as tensors of shape (..., 2, S, G, T, ...)."""
        shape = (*raw.shape[:-1], 2, sequences, self.heads, tokens)
        count = 2 * sequences * self.heads * tokens
        if self.compression is None:
            size = count * self.head_dim * self.dtype.itemsize
            return (raw[..., :size].view(self.dtype).view(*shape, self.head_dim),)
        codes = self.compression.code_bytes(self.head_dim)
        groups = self.compression.groups(self.head_dim)
        parameters = raw[..., count * codes : count * self.compression.row_bytes(self.head_dim)]
        return (raw[..., : count * codes].view(*shape, codes), parameters.view(torch.float16).view(*shape, groups, 2))

    def segment(self, stored: Stored) -> Segment:
        """A segment (2, S, G, T, ...) as attention takes it."""
        if self.compression is None:
            return PlainSegment(stored[0][0], stored[0][1])
        return PackedSegment(stored[0], stored[1], self.compression, self.head_dim)


class KVRegion:
    """Views into the bytes of one region (or of a prefix of it), wherever they lie."""

    def __init__(self, layout: KVLayout, form: KVForm) -> None:
        self.layout = layout
        self.form = form

    def whole(self, raw: Tensor) -> Stored:
        """(2, S, G, P + new tokens, ...) of a joined region; of several that are alike, raw (N, bytes) -> (N, 2, S, G,
        ...)."""
        return self.form.views(raw, self.layout.sequences, self.layout.tokens)

    def prompt(self, raw: Tensor) -> Stored:
        """(2, S, G, P, ...) at the start of ``raw`` (uint8)."""
        if self.layout.is_joined:
            return tuple(t[:, :, :, : self.layout.prompt_tokens] for t in self.whole(raw))
        return self.form.views(raw, self.layout.sequences, self.layout.prompt_tokens)

    def tail(self, raw: Tensor, segment: int) -> Stored:
        """(2, S, G, segment_tokens, ...) of one tail segment of a region."""
        if self.layout.is_joined:
            return tuple(t[:, :, :, self.layout.prompt_tokens :] for t in self.whole(raw))
        return self.loose_tail(raw[self.layout.prefix_bytes(segment) :])

    def loose_tail(self, raw: Tensor) -> Stored:
        """The same for a segment that lies by itself."""
        return self.form.views(raw, self.layout.sequences, self.layout.segment_tokens)

    def segments(self, raw: Tensor, tokens: int) -> list[Segment]:
        """The prompt and the first ``tokens`` generated tokens."""
        segments = [self.form.segment(self.prompt(raw))]
        for number in range(self.layout.used_segments(tokens)):
            used = min(self.layout.segment_tokens, tokens - number * self.layout.segment_tokens)
            segments.append(self.first_tokens(self.tail(raw, number), used))
        return segments

    def first_tokens(self, stored: Stored, count: int) -> Segment:
        return self.form.segment(tuple(t[:, :, :, :count] for t in stored))

    def append(self, raw: Tensor, token: int, slots: Sequence[int], new: Sequence[Stored]) -> None:
        """Write the ``token``-th generated token (from 1) of the sequences in these slots: K and V, (S', G, ...)
        each."""
        segment, place = divmod(token - 1, self.layout.segment_tokens)
        self._put(self.tail(raw, segment), place, slots, new)

    def append_loose(self, raw: Tensor, token: int, slots: Sequence[int], new: Sequence[Stored]) -> None:
        """The same into the one segment that is kept by itself."""
        self._put(self.loose_tail(raw), (token - 1) % self.layout.segment_tokens, slots, new)

    def put_prompt(self, raw: Tensor, slot: int, first: int, kv: Sequence[Stored], length: int) -> None:
        """Write prompt tokens ``first ..`` (tokens, G, ...) of one sequence; what lies beyond the prompt's end is
        zeroed with its last token, for it is multiplied by weight zero and must not hold NaN."""
        for target, k, v in zip(self.prompt(raw), *kv, strict=True):
            last = first + k.shape[0]
            target[0, slot, :, first:last] = k.transpose(0, 1)
            target[1, slot, :, first:last] = v.transpose(0, 1)
            if last == length:
                target[:, slot, :, last:] = 0

    def put_shared(self, raw: Tensor, first: int, kv: Sequence[Stored]) -> None:
        """Write prompt tokens ``first ..`` (tokens, G, ...) that are the same in every sequence."""
        for target, k, v in zip(self.prompt(raw), *kv, strict=True):
            for place, rows in enumerate((k, v)):
                target[place, :, :, first : first + rows.shape[0]] = rows.transpose(0, 1)

    def put_prompts(self, raw: Tensor, first: int, kv: Sequence[Stored]) -> None:
        """The same for all sequences at once, if all have the same tokens: (S * tokens, G, ...)."""
        sequences = self.layout.sequences
        for target, k, v in zip(self.prompt(raw), *kv, strict=True):
            tokens = k.shape[0] // sequences
            for place, rows in enumerate((k, v)):
                split = rows.view(sequences, tokens, *rows.shape[1:])
                target[place, :, :, first : first + tokens] = split.transpose(1, 2)

    def fed(self, raw: Tensor, slot: int, prompt: int, new: int) -> Stored:
        """Views or copies of what one sequence has in the cache: (2, G, prompt + new, ...)."""
        segments = [tuple(t[:, slot, :, :prompt] for t in self.prompt(raw))]
        for number in range(self.layout.used_segments(new)):
            used = min(self.layout.segment_tokens, new - number * self.layout.segment_tokens)
            segments.append(tuple(t[:, slot, :, :used] for t in self.tail(raw, number)))
        return tuple(torch.cat(parts, dim=2) for parts in zip(*segments, strict=True))

    def put_kept(self, raw: Tensor, slot: int, kept: Stored, first: int) -> None:
        """Write what ``fed`` gave, (2, G, tokens, ...), as the tokens from ``first`` on of one sequence's prompt."""
        for target, source in zip(self.prompt(raw), kept, strict=True):
            target[:, slot, :, first : first + source.shape[2]] = source

    def _put(self, segment: Stored, place: int, slots: Sequence[int], new: Sequence[Stored]) -> None:
        every = len(slots) == self.layout.sequences
        for target, k, v in zip(segment, *new, strict=True):
            for part, rows in enumerate((k, v)):
                if every:
                    target[part, :, :, place] = rows
                else:
                    for row, slot in enumerate(slots):
                        target[part, slot, :, place] = rows[row]
