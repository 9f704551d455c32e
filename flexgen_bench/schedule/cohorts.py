"""A job's sequences cut into cohorts, and the rooms they move into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Policy, Schedule
from flexgen_bench.core.tiers import Tier
from flexgen_bench.schedule.cohort import Cohort, Room, Span, clipped, start_cohort
from flexgen_bench.schedule.kv_layout import KVLayout
from flexgen_bench.schedule.placement import ShareSpreader, place_sequences

# A tail segment of a KV cache on disk is written at once; below this size direct writes lose most of a disk's
# bandwidth (measured: docs/notes/disk.md).
DISK_SEGMENT_BYTES = 128 * 1024
# More tail segments than this cost more in small matrix products than they save.
MAX_DISK_SEGMENTS = 8


@dataclass(frozen=True)
class Request:
    """One sequence to compute: prompt tokens and the most new tokens it may get. shared: leading tokens of the prompt that are those of every
    other prompt of the job, too."""

    prompt_len: int
    gen_len: int
    shared: int = 0


@dataclass(frozen=True)
class Capacity:
    """What an open job is planned for, before its requests are known: how many sequences may run at once, and the longest prompt and the most
    new tokens that one may have."""

    sequences: int
    prompt_len: int
    gen_len: int

    @property
    def largest(self) -> Request:
        """The request that takes all that one sequence may have."""
        return Request(self.prompt_len, self.gen_len)

    def holds(self, request: Request) -> bool:
        """Whether a request is within it."""
        return request.prompt_len <= self.prompt_len and request.gen_len <= self.gen_len


def worst_of(requests: Sequence[Request]) -> Request:
    """What a job of these is planned for: cohorts pad prompts to their longest and run to their longest answer, and nothing is shared."""
    return Request(max(r.prompt_len for r in requests), max(r.gen_len for r in requests))


@dataclass(frozen=True)
class Cohorts:
    """Which sequences start together (``groups``, in the order they start), and the rooms there are for them."""

    requests: tuple[Request, ...]
    groups: tuple[tuple[int, ...], ...]
    rooms: tuple[Room, ...]
    token_bytes: int  # K and V of one token in one layer, as stored
    compute: Tier
    by_room: (
        bool  # the n-th group moves into room n modulo rooms (block schedule); otherwise into any
    )

    def start(self, index: int, room: Room) -> Cohort:
        """The cohort of a group that moves into a room."""
        members = self.groups[index]
        lens = tuple(self.requests[i].prompt_len for i in members)
        gen_len = max(self.requests[i].gen_len for i in members)
        layouts = tuple(
            self._layout(span, max(lens), gen_len, gen_len)
            for span in clipped(room.kv, len(members))
        )
        return start_cohort(index, room, members, lens, gen_len, layouts, self._shared(members))

    def start_request(self, number: int, request: Request, room: Room) -> Cohort:
        """The cohort of one request of an open job. Its cache is laid out in segments of the capacity's size, so that it needs no more than
        the room was planned for: shorter segments, each rounded up to whole pages, might."""
        prompt, new = request.prompt_len, request.gen_len
        layouts = tuple(self._layout(span, prompt, new, self.lifetime) for span in room.kv)
        return start_cohort(number, room, (number,), (prompt,), new, layouts)

    def _shared(self, members: Sequence[int]) -> int:
        """Prompt tokens that sequences of the job share. Their keys and values are read back from the cache, so there must be one; and every
        prompt keeps a token of its own, which predicts its next."""
        if len(members) == 1 or self.lifetime <= 1:
            return 0
        return min(min(self.requests[i].shared, self.requests[i].prompt_len - 1) for i in members)

    def possible(self, room: Room) -> list[Cohort]:
        """Cohorts that may move into a room; one of those alike in all lengths is enough."""
        first = room.index if self.by_room else 0
        return [self.start(index, room) for index in self._distinct[first]]

    @cached_property
    def alike(self) -> tuple[Room, ...]:
        """For every room the first one that is like it: the same tiers, and the same cohorts that may move in. Large jobs have many
        rooms and few kinds of them."""
        first: dict[object, Room] = {}
        found = []
        for room in self.rooms:
            groups = self._distinct[room.index if self.by_room else 0]
            lens = tuple(tuple(self.requests[i] for i in self.groups[g]) for g in groups)
            found.append(first.setdefault((room.kv, room.hidden, lens), room))
        return tuple(found)

    @cached_property
    def _distinct(self) -> tuple[tuple[int, ...], ...]:
        """Groups that differ in their lengths, per room that they may move into (one list if that is any)."""
        lists = len(self.rooms) if self.by_room else 1
        found = []
        for first in range(lists):
            seen: dict[tuple[Request, ...], int] = {}
            for index in range(first, len(self.groups), lists):
                seen.setdefault(tuple(self.requests[i] for i in self.groups[index]), index)
            found.append(tuple(seen.values()))
        return tuple(found)

    @cached_property
    def lifetime(self) -> int:
        """Passes that the longest-lived cohort runs, if no sequence ends early."""
        return max(request.gen_len for request in self.requests)

    def _layout(self, span: Span, prompt_len: int, gen_len: int, planned: int) -> KVLayout:
        """Segments of one span's cache, as long as suits ``planned`` new tokens. Where attention happens in place, generated tokens are one
        segment."""
        new = max(planned - 1, 0)  # the last token is never fed back
        segment = max(new, 1)
        if span.tier is Tier.DISK:
            worthwhile = -(-DISK_SEGMENT_BYTES // (max(span.count, 1) * self.token_bytes))
            segment = min(segment, max(worthwhile, -(-new // MAX_DISK_SEGMENTS), 1))
        elif span.tier is not self.compute:
            segment = min(segment, max(1, -(-new // MAX_DISK_SEGMENTS)))
        return KVLayout(span.count, prompt_len, max(gen_len - 1, 0), segment, self.token_bytes)


def form_cohorts(
    shape: ModelShape,
    dtype: DType,
    policy: Policy,
    asked: Sequence[Request] | Capacity,
    compute: Tier,
) -> Cohorts:
    """Cut a job into cohorts; prompts of similar length start together.

    Block schedule: a cohort is a micro-batch. Continuous: a cohort is what starts in one pass if a block's sequences are spread
    evenly over the passes that a sequence lives; several cohorts share a micro-batch when they decode. Open jobs (a capacity instead of
    requests): every sequence is a cohort, which moves into any room.
    """
    continuous = policy.schedule is Schedule.CONTINUOUS
    if isinstance(asked, Capacity):
        requests: Sequence[Request] = [asked.largest] * asked.sequences
        continuous, size = True, 1
    else:
        requests, size = asked, min(policy.gpu_batch_size, len(asked))
        if continuous:
            size = min(size, _starting(policy.block_size, max(r.gen_len for r in requests)))
    order = sorted(range(len(requests)), key=lambda i: requests[i].prompt_len)
    groups = tuple(tuple(order[i : i + size]) for i in range(0, len(order), size))
    count = min(policy.block_size // size if continuous else policy.num_gpu_batches, len(groups))
    # In the block schedule the last room may be smaller; in the continuous one any cohort moves into any room.
    sizes = [size if continuous else len(groups[room]) for room in range(count)]
    kv, hidden = ShareSpreader(policy.kv_cache), ShareSpreader(policy.activations)
    rooms = tuple(
        Room(index, place_sequences(own, kv), place_sequences(own, hidden))
        for index, own in enumerate(sizes)
    )
    return Cohorts(
        tuple(requests), groups, rooms, kv_token_bytes(shape, dtype, policy), compute,
        not continuous,
    )  # fmt: skip


def _starting(block: int, lifetime: int) -> int:
    """How many sequences of a block start together so that as nearly as possible the same number starts in every pass of a lifetime.

    A block's sequences over a lifetime's passes is seldom a whole number. A little less makes more cohorts than passes, so that two start in some;
    a little more leaves some passes without. Both are uneven by ``(part) (1 - part) size^2``, the variance of what starts in a pass.
    """
    less = max(1, block // lifetime)

    def unevenness(size: int) -> float:
        part = block // size / lifetime % 1
        return part * (1 - part) * size**2

    return min((size for size in (less, less + 1) if size <= block), key=unevenness)


def kv_token_bytes(shape: ModelShape, dtype: DType, policy: Policy) -> int:
    """K and V of one token in one layer, in the form in which they are stored."""
    compression = policy.lossy.kv_cache
    row = (
        shape.head_dim * dtype.bytes
        if compression is None
        else compression.row_bytes(shape.head_dim)
    )
    return 2 * shape.num_kv_heads * row
