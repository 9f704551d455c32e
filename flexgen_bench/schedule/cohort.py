"""Sequences that start together and share a room in the KV cache until the last of them has ended."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from flexgen_bench.core.tiers import Tier
from flexgen_bench.schedule.kv_layout import KVLayout


@dataclass(frozen=True)
class Span:
    """Sequences ``start .. stop-1`` of a room or a cohort, on one tier."""

    tier: Tier
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Room:
    """A place for one cohort at a time: which of its sequences have their KV cache and hidden states on which tier."""

    index: int
    kv: tuple[Span, ...]
    hidden: tuple[Span, ...]

    @property
    def size(self) -> int:
        return max(span.stop for span in self.kv)


@dataclass(frozen=True)
class Cohort:
    """The sequences of a room that are still being generated, in the room's order.

    index: number of the cohort in the job; sequences: their numbers in the job; prompt_lens: tokens of each; gen_len:
    most new tokens of any of them. kv, hidden: which of them are in which span of the room (a span may be empty).
    layouts: how each KV span lies in its home; slots: each sequence's place in its KV span's home. shared: leading prompt tokens that all
    of them have in common, computed once, with the first sequence; fewer than the shortest prompt has.
    origin: the cohort as it was when it started, if sequences have left since.
    """

    index: int
    room: int
    sequences: tuple[int, ...]
    prompt_lens: tuple[int, ...]
    gen_len: int
    kv: tuple[Span, ...]
    hidden: tuple[Span, ...]
    layouts: tuple[KVLayout, ...]
    slots: tuple[int, ...]
    shared: int = 0
    origin: Cohort | None = None

    @property
    def size(self) -> int:
        return len(self.sequences)

    @property
    def whole(self) -> Cohort:
        """The cohort as it started."""
        return self.origin or self

    def without(self, ended: Collection[int]) -> Cohort:
        """This cohort after the sequences with these job numbers have left."""
        stay = [place for place, number in enumerate(self.sequences) if number not in ended]
        return replace(
            self,
            sequences=tuple(self.sequences[place] for place in stay),
            prompt_lens=tuple(self.prompt_lens[place] for place in stay),
            slots=tuple(self.slots[place] for place in stay),
            kv=_closed_up(self.kv, stay),
            hidden=_closed_up(self.hidden, stay),
            origin=self.whole,
        )


def start_cohort(
    index: int,
    room: Room,
    sequences: tuple[int, ...],
    prompt_lens: tuple[int, ...],
    gen_len: int,
    layouts: tuple[KVLayout, ...],
    shared: int = 0,
) -> Cohort:
    """A cohort that moves into a room; it may have fewer sequences than there is room for."""
    kv, hidden = clipped(room.kv, len(sequences)), clipped(room.hidden, len(sequences))
    slots = tuple(place - span.start for span in kv for place in range(span.start, span.stop))
    return Cohort(
        index, room.index, sequences, prompt_lens, gen_len, kv, hidden, layouts, slots, shared
    )  # fmt: skip


def clipped(spans: tuple[Span, ...], size: int) -> tuple[Span, ...]:
    """A room's spans for only its first ``size`` sequences."""
    return tuple(Span(s.tier, min(s.start, size), min(s.stop, size)) for s in spans)


def _closed_up(spans: tuple[Span, ...], stay: list[int]) -> tuple[Span, ...]:
    closed, start = [], 0
    for span in spans:
        count = sum(span.start <= place < span.stop for place in stay)
        closed.append(Span(span.tier, start, start + count))
        start += count
    return tuple(closed)
