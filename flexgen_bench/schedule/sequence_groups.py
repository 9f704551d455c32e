"""A job's sequences cut into sequence groups, and the KV slots they move into."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import AttentionSite, Placement, Policy, Schedule
from flexgen_bench.core.tiers import Tier
from flexgen_bench.schedule.kv_disk_ring import DiskRing
from flexgen_bench.schedule.kv_layout import KVLayout, ring_layout
from flexgen_bench.schedule.placement import ShareSpreader, place_attention, place_sequences
from flexgen_bench.schedule.sequence_group import KVSlot, SequenceGroup, Span, clipped, start_group

# A tail segment of a KV cache on disk is written at once; below this size direct writes lose most of a disk's
# bandwidth (measured: docs/notes/disk.md).
DISK_SEGMENT_BYTES = 128 * 1024
# More tail segments than this cost more in small matrix products than they save.
MAX_DISK_SEGMENTS = 8


@dataclass(frozen=True)
class Request:
    """One sequence to compute: prompt tokens and the most new tokens it may get. shared: leading tokens of the prompt
    that are those of every other prompt of the job, too; kept: leading tokens whose keys and values are there from an
    earlier sequence (open jobs)."""

    prompt_len: int
    gen_len: int
    shared: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Capacity:
    """What an open job is planned for, before its requests are known: how many sequences may run at once, and the
    longest prompt and the most new tokens that one may have. kept_tokens: most tokens, over all sequences that have
    ended, whose keys and values are kept for others to go on from; 0: none."""

    sequences: int
    prompt_len: int
    gen_len: int
    kept_tokens: int = 0

    @property
    def keeps(self) -> bool:
        """Whether sequences may go on from what an earlier one has computed."""
        return self.kept_tokens > 0

    @property
    def largest(self) -> Request:
        """The request that takes all that one sequence may have."""
        return Request(self.prompt_len, self.gen_len, kept=int(self.keeps and self.prompt_len > 1))

    def holds(self, request: Request) -> bool:
        """Whether a request is within it."""
        return request.prompt_len <= self.prompt_len and request.gen_len <= self.gen_len


def worst_of(requests: Sequence[Request]) -> Request:
    """What a job of these is planned for: sequence groups pad prompts to their longest and run to their longest answer,
    and nothing is shared."""
    return Request(max(r.prompt_len for r in requests), max(r.gen_len for r in requests))


@dataclass(frozen=True)
class SequenceGroups:
    """Which sequences start together (``members``, in the order they start), and the KV slots there are for them.

    rings: windows of layers whose caches keep the window's tokens alone. is_open: made for a capacity. waves: parts
    that take their passes in turn; groups and KV slots belong to them one after the other."""

    requests: tuple[Request, ...]
    members: tuple[tuple[int, ...], ...]
    kv_slots: tuple[KVSlot, ...]
    token_bytes: int  # K and V of one token in one layer, as stored
    compute: Tier
    by_slot: bool  # the n-th group moves into KV slot n modulo KV slots (block schedule); otherwise into any
    rings: tuple[int, ...] = ()
    is_open: bool = False
    waves: int = 1

    def members_of(self, wave: int) -> range:
        """The numbers of a wave's groups."""
        return range(wave, len(self.members), self.waves)

    def slots_of(self, wave: int) -> range:
        """The numbers of a wave's KV slots."""
        return range(wave, len(self.kv_slots), self.waves)

    def start(self, index: int, kv_slot: KVSlot) -> SequenceGroup:
        """The sequence group of a group that moves into a KV slot."""
        own = self.members[index]
        lens = tuple(self.requests[i].prompt_len for i in own)
        gen_len = max(self.requests[i].gen_len for i in own)
        spans, longest = clipped(kv_slot.kv, len(own)), max(lens)
        layouts = tuple(self._layout(span, longest, gen_len, gen_len) for span in spans)
        rings = {w: tuple(self._ring(span, w, longest, gen_len) for span in spans) for w in self.rings}
        kept = self.requests[own[0]].kept if len(own) == 1 else 0
        return start_group(index, kv_slot, own, lens, gen_len, layouts, self._shared(own), kept, rings)

    def start_request(self, number: int, request: Request, kv_slot: KVSlot) -> SequenceGroup:
        """The sequence group of one request of an open job. Its cache is laid out in segments of the capacity's size,
        so that it needs no more than the KV slot was planned for: shorter segments, each rounded up to whole pages,
        might."""
        prompt, new = request.prompt_len, request.gen_len
        spans, planned = kv_slot.kv, self.lifetime
        layouts = tuple(self._layout(span, prompt, new, planned) for span in spans)
        rings = {w: tuple(self._ring(span, w, prompt, new) for span in spans) for w in self.rings}
        return start_group(number, kv_slot, (number,), (prompt,), new, layouts, kept=request.kept, rings=rings)

    def _shared(self, members: Sequence[int]) -> int:
        """Prompt tokens that sequences of the job share. Their keys and values are read back from the cache, so there
        must be one; and every prompt keeps a token of its own, which predicts its next."""
        if len(members) == 1 or self.lifetime <= 1:
            return 0
        return min(min(self.requests[i].shared, self.requests[i].prompt_len - 1) for i in members)

    def possible(self, kv_slot: KVSlot) -> list[SequenceGroup]:
        """Sequence groups that may move into a KV slot; one of those alike in all lengths is enough."""
        first = kv_slot.index if self.by_slot else 0
        return [self.start(index, kv_slot) for index in self._distinct[first]]

    @cached_property
    def alike(self) -> tuple[KVSlot, ...]:
        """For every KV slot the first one that is like it: the same tiers, and the same sequence groups that may move
        in. Large jobs have many KV slots and few kinds of them."""
        first: dict[object, KVSlot] = {}
        representatives = []
        for kv_slot in self.kv_slots:
            groups = self._distinct[kv_slot.index if self.by_slot else 0]
            lens = tuple(tuple(self.requests[i] for i in self.members[g]) for g in groups)
            representatives.append(first.setdefault((kv_slot.kv, kv_slot.hidden, lens), kv_slot))
        return tuple(representatives)

    @cached_property
    def _distinct(self) -> tuple[tuple[int, ...], ...]:
        """Groups that differ in their lengths, per KV slot that they may move into (one list if that is any)."""
        lists = len(self.kv_slots) if self.by_slot else 1
        distinct = []
        for first in range(lists):
            seen: dict[tuple[Request, ...], int] = {}
            for index in range(first, len(self.members), lists):
                seen.setdefault(tuple(self.requests[i] for i in self.members[index]), index)
            distinct.append(tuple(seen.values()))
        return tuple(distinct)

    @cached_property
    def lifetime(self) -> int:
        """Passes that the longest-lived sequence group runs, if no sequence ends early."""
        return max(request.gen_len for request in self.requests)

    def _layout(self, span: Span, prompt_len: int, gen_len: int, planned: int) -> KVLayout:
        """Segments of one span's cache, as long as suits ``planned`` new tokens. Where attention happens in place,
        generated tokens are one segment."""
        new = max(planned - 1, 0)  # the last token is never fed back
        segment = max(new, 1)
        if span.tier is Tier.DISK:
            worthwhile = -(-DISK_SEGMENT_BYTES // (max(span.count, 1) * self.token_bytes))
            segment = min(segment, max(worthwhile, -(-new // MAX_DISK_SEGMENTS), 1))
        elif span.tier is not self.compute:
            segment = min(segment, max(1, -(-new // MAX_DISK_SEGMENTS)))
        stays = span.tier is self.compute
        return KVLayout(span.count, prompt_len, max(gen_len - 1, 0), segment, self.token_bytes, is_joined=stays)

    def _ring(self, span: Span, window: int, prompt_len: int, gen_len: int) -> KVLayout:
        """One span's cache of a window's tokens: in segments on disk, and where it is moved, unless prompts fill it. Of
        an open job all requests have the same."""
        new = max(gen_len - 1, 0)
        if span.tier is Tier.DISK:
            worthwhile = -(-DISK_SEGMENT_BYTES // (max(span.count, 1) * self.token_bytes))
            written = -(-window // min(max(window // worthwhile, 1), MAX_DISK_SEGMENTS))
            return DiskRing(span.count, 0, new, written, self.token_bytes, ring=window, longest=prompt_len)
        segment = None
        if span.tier is not self.compute:
            is_full = prompt_len >= window and not self.is_open
            segment = window if is_full else -(-window // MAX_DISK_SEGMENTS)
        return ring_layout(span.count, window, prompt_len, new, segment, self.token_bytes)


def form_groups(
    shape: ModelShape,
    dtype: DType,
    policy: Policy,
    demand: Sequence[Request] | Capacity,
    compute: Tier,
    windows: Collection[int] = (),
    waves: int = 1,
) -> SequenceGroups:
    """Cut a job into sequence groups; prompts of similar length start together.

    Block schedule: a sequence group is a micro-batch. Continuous: a sequence group is what starts in one pass if a
    block's sequences are spread evenly over the passes that a sequence lives; several sequence groups share a
    micro-batch when they decode. Open jobs (a capacity instead of requests): every sequence is a sequence group, which
    moves into any KV slot.

    windows: of layers whose caches may keep the window's tokens alone; where no sequence leaves it, they keep all.
    waves: each has a block of the policy's.
    """
    continuous = policy.schedule is Schedule.CONTINUOUS
    if isinstance(demand, Capacity):
        requests: Sequence[Request] = [demand.largest] * demand.sequences
        continuous, size = True, 1
    else:
        requests, size = demand, min(policy.gpu_batch_size, len(demand))
        if continuous:
            size = min(size, _starting(policy.block_size, max(r.gen_len for r in requests)))
    order = sorted(range(len(requests)), key=lambda i: requests[i].prompt_len)
    groups = tuple(tuple(order[i : i + size]) for i in range(0, len(order), size))
    count = min(waves * (policy.block_size // size if continuous else policy.num_gpu_batches), len(groups))
    # In the block schedule the last KV slot may be smaller; in the continuous one any sequence group moves into any KV
    # slot.
    sizes = [size if continuous else len(groups[kv_slot]) for kv_slot in range(count)]
    kv, hidden = ShareSpreader(policy.kv_cache), ShareSpreader(policy.activations)
    # Where sequences whose cache is in host memory are attended to.
    moved = ShareSpreader(Placement(gpu=policy.kv_moved, cpu=1 - policy.kv_moved))
    delegated = compute is Tier.GPU and policy.attention is AttentionSite.CPU

    def cached(count: int) -> tuple[Span, ...]:
        spans = place_sequences(count, kv)
        return place_attention(spans, moved) if delegated else spans

    kv_slots = tuple(KVSlot(index, cached(own), place_sequences(own, hidden)) for index, own in enumerate(sizes))
    return SequenceGroups(
        tuple(requests),
        groups,
        kv_slots,
        kv_token_bytes(shape, dtype, policy),
        compute,
        not continuous,
        _left(windows, requests, groups),
        isinstance(demand, Capacity),
        waves,
    )


def _left(windows: Collection[int], requests: Sequence[Request], groups: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The windows that a sequence leaves, if anything is cached at all."""
    if not windows or max(r.gen_len for r in requests) == 1:
        return ()
    longest = max(max(requests[i].prompt_len for i in g) + max(requests[i].gen_len for i in g) - 1 for g in groups)
    return tuple(sorted(window for window in windows if window < longest))


def _starting(block: int, lifetime: int) -> int:
    """How many sequences of a block start together so that as nearly as possible the same number starts in every pass
    of a lifetime.

    A block's sequences over a lifetime's passes is seldom a whole number. A little less makes more sequence groups than
    passes, so that two start in some; a little more leaves some passes without. Both are uneven by
    ``(part) (1 - part) size^2``, the variance of what starts in a pass.
    """
    less = max(1, block // lifetime)

    def unevenness(size: int) -> float:
        part = block // size / lifetime % 1
        return part * (1 - part) * size**2

    return min((size for size in (less, less + 1) if size <= block), key=unevenness)


def kv_token_bytes(shape: ModelShape, dtype: DType, policy: Policy) -> int:
    """K and V of one token in one layer, in the form in which they are stored."""
    compression = policy.lossy.kv_cache
    row = shape.head_dim * dtype.bytes if compression is None else compression.row_bytes(shape.head_dim)
    return 2 * shape.num_kv_heads * row
