"""Sequences that start together and share a KV slot until the last of them has ended."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from flexgen_bench.core.policy import AttentionSite
from flexgen_bench.core.tiers import Tier
from flexgen_bench.schedule.kv_layout import KVLayout


@dataclass(frozen=True)
class Span:
    """Sequences ``start .. stop-1`` of a KV slot or a sequence group, on one tier. attention: of a cache that is not on
    the accelerator that computes its layer, where it is attended to in decode."""

    tier: Tier
    start: int
    stop: int
    attention: AttentionSite = AttentionSite.COMPUTE

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def is_delegated(self) -> bool:
        """Whether the cpu attends to it for an accelerator."""
        return self.tier is not Tier.GPU and self.attention is AttentionSite.CPU

    @property
    def is_moved(self) -> bool:
        """Whether it is moved to an accelerator in every decode pass, where one computes its layer."""
        return self.tier is not Tier.GPU and self.attention is AttentionSite.COMPUTE


@dataclass(frozen=True)
class KVSlot:
    """A place for one sequence group at a time: which of its sequences have their KV cache and hidden states on which
    tier."""

    index: int
    kv: tuple[Span, ...]
    hidden: tuple[Span, ...]

    @property
    def size(self) -> int:
        return max(span.stop for span in self.kv)


@dataclass(frozen=True)
class SequenceGroup:
    """The sequences of a KV slot that are still being generated, in the KV slot's order.

    index: number of the sequence group in the job; sequences: their numbers in the job; prompt_lens: tokens of each;
    gen_len: most new tokens of any of them. kv, hidden: which of them are in which span of the KV slot (a span may be
    empty). layouts: how each KV span lies in its home, of layers that keep every token; rings: the same of layers that
    keep a window's tokens, by window; places: each sequence's place in its KV span's home. shared:
    leading prompt tokens that all of them have in common, computed once, with the first sequence; fewer than the
    shortest prompt has. kept: leading prompt tokens of its only sequence that are in the cache before it starts.
    origin: the sequence group as it was when it started, if sequences have left since.
    """

    index: int
    kv_slot: int
    sequences: tuple[int, ...]
    prompt_lens: tuple[int, ...]
    gen_len: int
    kv: tuple[Span, ...]
    hidden: tuple[Span, ...]
    layouts: tuple[KVLayout, ...]
    places: tuple[int, ...]
    shared: int = 0
    kept: int = 0
    origin: SequenceGroup | None = None
    rings: Mapping[int, tuple[KVLayout, ...]] = field(default_factory=dict, hash=False)

    @property
    def size(self) -> int:
        return len(self.sequences)

    @property
    def whole(self) -> SequenceGroup:
        """The sequence group as it started."""
        return self.origin or self

    def laid_out(self, ring: int | None) -> tuple[KVLayout, ...]:
        """How each KV span lies in its home, of layers whose cache is such a ring."""
        return self.layouts if ring is None else self.rings[ring]

    def without(self, ended: Collection[int]) -> SequenceGroup:
        """This sequence group after the sequences with these job numbers have left."""
        stay = [place for place, number in enumerate(self.sequences) if number not in ended]
        return replace(
            self,
            sequences=tuple(self.sequences[place] for place in stay),
            prompt_lens=tuple(self.prompt_lens[place] for place in stay),
            places=tuple(self.places[place] for place in stay),
            kv=_closed_up(self.kv, stay),
            hidden=_closed_up(self.hidden, stay),
            origin=self.whole,
        )


def start_group(
    index: int,
    kv_slot: KVSlot,
    sequences: tuple[int, ...],
    prompt_lens: tuple[int, ...],
    gen_len: int,
    layouts: tuple[KVLayout, ...],
    shared: int = 0,
    kept: int = 0,
    rings: Mapping[int, tuple[KVLayout, ...]] | None = None,
) -> SequenceGroup:
    """A sequence group that moves into a KV slot; it may have fewer sequences than there is room for."""
    kv, hidden = clipped(kv_slot.kv, len(sequences)), clipped(kv_slot.hidden, len(sequences))
    places = tuple(place - span.start for span in kv for place in range(span.start, span.stop))
    return SequenceGroup(
        index,
        kv_slot.index,
        sequences,
        prompt_lens,
        gen_len,
        kv,
        hidden,
        layouts,
        places,
        shared,
        kept,
        rings=rings or {},
    )


def clipped(spans: tuple[Span, ...], size: int) -> tuple[Span, ...]:
    """A KV slot's spans for only its first ``size`` sequences."""
    return tuple(replace(s, start=min(s.start, size), stop=min(s.stop, size)) for s in spans)


def _closed_up(spans: tuple[Span, ...], stay: list[int]) -> tuple[Span, ...]:
    closed, start = [], 0
    for span in spans:
        count = sum(span.start <= place < span.stop for place in stay)
        closed.append(replace(span, start=start, stop=start + count))
        start += count
    return tuple(closed)
