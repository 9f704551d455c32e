"""What is computed together in a pass: prompt tokens of a sequence group, or the next token of one or more sequence
groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from flexgen_bench.core.tiers import Tier
from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.kv_layout import KVLayout
from flexgen_bench.schedule.sequence_group import SequenceGroup, Span


@dataclass(frozen=True)
class Member:
    """A sequence group's share of a micro-batch.

    token: 0 while its prompts are computed, n when their n-th new token is fed. start, stop: which tokens of each
    prompt (token 0 only); stop None means to the end.
    """

    group: SequenceGroup
    token: int
    start: int = 0
    stop: int | None = None

    @cached_property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Positions ``first .. last-1`` that are computed, per sequence; empty where a prompt is shorter. What all
        prompts share is computed with the first."""
        lens = self.group.prompt_lens
        if self.token:
            return tuple((n + self.token - 1, n + self.token) for n in lens)

        def part(n: int, first: int) -> tuple[int, int]:
            last = n if self.stop is None else min(self.stop, n)
            return min(first, last), last

        # Most prompts are as long as others.
        of_len = {n: part(n, max(self.start, self.group.shared)) for n in set(lens)}
        return (part(lens[0], self.start), *(of_len[n] for n in lens[1:]))

    @property
    def shared_rows(self) -> int:
        """How many of this member's rows, its first ones, are tokens that all of its prompts share."""
        first, last = self.ranges[0]
        return 0 if self.token else max(0, min(last, self.group.shared) - first)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each sequence's rows start in this member's rows; one more entry than sequences."""
        if self.token:  # one row each
            return tuple(range(self.group.size + 1))
        rows = (last - first for first, last in self.ranges)
        return tuple(accumulate(rows, initial=0))

    @property
    def is_last_chunk(self) -> bool:
        return self.stop is None or self.stop >= max(self.group.prompt_lens)


@dataclass(frozen=True)
class Part:
    """One span of one member: sequences whose KV cache (or hidden states) lie together, and their rows here.

    index: its number in the micro-batch; home: the span's number in the KV slot; kv_buffer: staging buffer for a KV
    cache that is moved.
    """

    index: int
    member: Member
    home: int
    span: Span
    row: int  # first of its rows in the micro-batch
    stop: int  # one after the last
    kv_buffer: int = 0

    @property
    def group(self) -> SequenceGroup:
        return self.member.group

    @property
    def tier(self) -> Tier:
        return self.span.tier

    @property
    def token(self) -> int:
        return self.member.token

    @property
    def rows(self) -> int:
        return self.stop - self.row

    @property
    def is_staged(self) -> bool:
        """Whether its cache passes through a staging buffer where an accelerator computes."""
        return self.tier is Tier.DISK or self.span.is_moved

    def layout(self, ring: int | None = None) -> KVLayout:
        """How its cache lies in its home, of layers whose cache is such a ring."""
        group = self.member.group
        return (group.layouts if ring is None else group.rings[ring])[self.home]

    def newest(self, ring: int | None) -> tuple[int, ...] | None:
        """Slots of a ring in which the fed tokens are; None where they come last of all."""
        return None if ring is None else tuple(map(self.layout(ring).newest_slot, self.positions))

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """Of the tokens that are fed, in decode: one of each sequence."""
        return tuple(n + self.token - 1 for n in self.group.prompt_lens[self.span.start : self.span.stop])

    def pairs(self, window: int | None = None) -> int:
        """Pairs of a decoded token and one it attends to, itself among them; a window lets it see no more than so
        many."""
        if window not in self._pairs:  # the same in every layer with this window
            lens = [n + self.token for n in self.group.prompt_lens[self.span.start : self.span.stop]]
            self._pairs[window] = sum(lens) if window is None else sum(min(n, window) for n in lens)
        return self._pairs[window]

    @cached_property
    def _pairs(self) -> dict[int | None, int]:
        return {}


@dataclass(frozen=True)
class MicroBatch:
    """Sequences computed together.

    index: its number in the pass. buffer_index: its staging buffer; prompt_buffer: the one where keys and values of its
    prompts gather (the same for all chunks); first_kv_buffer: of ``num_kv_buffers`` KV staging buffers, the one for its
    first part. chunk: number of the chunk of its prompts. logit_rows: rows whose logits are needed; without any, the
    head does not run. samples_on_device: its next tokens are chosen where the head is computed, and stay there.
    """

    index: int
    members: tuple[Member, ...]
    buffer_index: int
    prompt_buffer: int
    first_kv_buffer: int
    num_kv_buffers: int
    logit_rows: tuple[int, ...]
    chunk: int = 0
    samples_on_device: bool = False

    @cached_property
    def token(self) -> int:
        """0 in prefill; in decode, of the member that has come furthest."""
        return max((member.token for member in self.members), default=0)

    @property
    def is_prefill(self) -> bool:
        return self.token == 0

    @cached_property
    def rows(self) -> int:
        """Rows of hidden states: one per token computed."""
        return sum(member.offsets[-1] for member in self.members)

    @cached_property
    def sequences(self) -> int:
        return sum(member.group.size for member in self.members)

    def prompt_pairs(self, window: int | None = None) -> int:
        """Pairs of a prompt token computed here and one it attends to: token t attends to t + 1, or to as many as the
        window has."""
        if window not in self._prompt_pairs:  # the same in every layer with this window
            ranges = (r for member in self.members for r in member.ranges)
            self._prompt_pairs[window] = sum(_pairs(last, window) - _pairs(first, window) for first, last in ranges)
        return self._prompt_pairs[window]

    @cached_property
    def _prompt_pairs(self) -> dict[int | None, int]:
        return {}

    @cached_property
    def kv_parts(self) -> tuple[Part, ...]:
        parts = self._parts([member.group.kv for member in self.members])
        if not self.is_divided:
            return parts
        turns = accumulate((part.is_staged for part in parts), initial=self.first_kv_buffer)
        return tuple(replace(part, kv_buffer=n % self.num_kv_buffers) for part, n in zip(parts, turns, strict=False))

    @cached_property
    def is_divided(self) -> bool:
        """Whether, of caches below an accelerator, some are moved to it and the cpu attends to others."""
        spans = [span for member in self.members for span in member.group.kv if span.count]
        return any(span.is_delegated for span in spans) and any(span.is_moved for span in spans)

    @property
    def kv_turns(self) -> int:
        """How often it takes the next KV staging buffer: once for each part; where it is divided, only for those that
        need one, so that those that are moved do not all get the same."""
        return sum(part.is_staged or not self.is_divided for part in self.kv_parts)

    @cached_property
    def attended(self) -> tuple[tuple[int, int], ...]:
        """In decode, of every part of the cache: rows, and pairs of a row and a token it attends to."""
        return tuple((part.rows, part.pairs()) for part in self.kv_parts)

    @cached_property
    def hidden_parts(self) -> tuple[Part, ...]:
        """Only those with rows here: in late chunks, short prompts have none."""
        parts = self._parts([member.group.hidden for member in self.members])
        with_rows = [part for part in parts if part.rows]
        return tuple(replace(part, index=index) for index, part in enumerate(with_rows))

    @cached_property
    def place(self) -> tuple[int, int]:
        """KV slot of its first sequences, and chunk: no other micro-batch that is under way has the same."""
        return self.members[0].group.kv_slot, self.chunk

    @cached_property
    def hidden_tier(self) -> Tier | None:
        """Where all of its hidden states live; None if they are on several tiers."""
        tiers = {part.tier for part in self.hidden_parts}
        return tiers.pop() if len(tiers) == 1 else None

    @cached_property
    def hidden_homes(self) -> tuple[Buffer, ...]:
        """Where each part's hidden states live between units; each chunk of a prompt has a place of its own."""
        return tuple(Buffer("hidden", part.group.kv_slot, self.chunk, part.home) for part in self.hidden_parts)

    @cached_property
    def token_buffers(self) -> tuple[Buffer, ...]:
        """The next tokens of its sequences."""
        return tuple(Buffer("tokens", member.group.kv_slot) for member in self.members)

    @cached_property
    def known(self) -> dict[object, tuple[Buffer, ...]]:
        """What the generator has worked out for this micro-batch: it is the same in every layer."""
        return {}

    def buffer(self, name: str, part: int = 0) -> Buffer:
        """The staging buffer of this name that the micro-batch has (for one of its parts)."""
        return Buffer(name, self.buffer_index, part=part)

    def _parts(self, spans: list[tuple[Span, ...]]) -> tuple[Part, ...]:
        parts: list[Part] = []
        row = 0
        for member, own in zip(self.members, spans, strict=True):
            for home, span in enumerate(own):
                start, stop = row + member.offsets[span.start], row + member.offsets[span.stop]
                if span.count:
                    number = len(parts)
                    parts.append(
                        Part(
                            number,
                            member,
                            home,
                            span,
                            start,
                            stop,
                            (self.first_kv_buffer + number) % self.num_kv_buffers,
                        )
                    )
            row += member.offsets[-1]
        return tuple(parts)


def _pairs(tokens: int, window: int | None) -> int:
    """Of the first ``tokens`` tokens of a sequence, and what they attend to."""
    beyond = 0 if window is None else max(0, tokens - window)
    return tokens * (tokens + 1) // 2 - beyond * (beyond + 1) // 2


# What steps belong to that serve all micro-batches of a pass: it has no sequences, and no rows.
NO_MICRO_BATCH = MicroBatch(-1, (), 0, 0, 0, 1, ())
