"""From shares to places: which unit and which sequence goes to which tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flexgen_bench.core.policy import AttentionSite, Placement
from flexgen_bench.core.tiers import Tier
from flexgen_bench.schedule.sequence_group import Span


class ShareSpreader:
    """Hands out items so that every prefix is as close to the shares as whole items allow.

    Each item goes to the tier that is furthest behind its share of all bytes handed out so far, this item
    included. Resident layers thereby spread evenly over the depth and hide the loads of their neighbours, and
    realised shares are within one item of the requested ones.
    """

    def __init__(self, placement: Placement) -> None:
        shares = {tier: placement.share(tier) for tier in Tier}  # fastest first
        self._shares = {tier: share for tier, share in shares.items() if share > 0}
        self._given = dict.fromkeys(self._shares, 0.0)

    @property
    def only(self) -> Tier | None:
        """The tier that everything goes to, if it is one."""
        return next(iter(self._shares)) if len(self._shares) == 1 else None

    def place(self, size: float) -> Tier:
        """Of tiers that are as far behind, the fastest."""
        shares, given = self._shares, self._given
        total = sum(given.values()) + size
        chosen = max(shares, key=lambda tier: shares[tier] * total - given[tier])
        given[chosen] += size
        return chosen


def place_units(sizes: Sequence[int], placement: Placement) -> list[Tier]:
    """A tier for each unit of the model, in order."""
    spreader = ShareSpreader(placement)
    return [spreader.place(size) for size in sizes]


def place_sequences(count: int, spreader: ShareSpreader) -> tuple[Span, ...]:
    """Split ``count`` sequences of a micro-batch into one span per tier, fastest first.

    The spreader is shared by all micro-batches of a block, so shares that do not divide one micro-batch
    still come out right over the block.
    """
    per_tier = dict.fromkeys(Tier, 0)
    if spreader.only is not None:
        per_tier[spreader.only] = count
    else:
        for _ in range(count):
            per_tier[spreader.place(1)] += 1
    spans, start = [], 0
    for tier in Tier:
        if per_tier[tier]:
            spans.append(Span(tier, start, start + per_tier[tier]))
            start += per_tier[tier]
    return tuple(spans)


def place_attention(spans: tuple[Span, ...], moved: ShareSpreader) -> tuple[Span, ...]:
    """The same spans, attended to by the cpu where they are below the accelerator; those in host memory are cut in two,
    first the sequences that are moved all the same.

    moved: hands out where a sequence in host memory is attended to; shared as in ``place_sequences``.
    """
    placed: list[Span] = []
    for span in spans:
        if span.tier is not Tier.CPU:
            placed.append(replace(span, attention=AttentionSite.CPU) if span.tier is Tier.DISK else span)
            continue
        count = span.count if moved.only is None else 0
        middle = span.start + sum(moved.place(1) is Tier.GPU for _ in range(count))
        placed += [replace(span, stop=middle), replace(span, start=middle, attention=AttentionSite.CPU)]
    return tuple(span for span in placed if span.count)


def realised(bytes_per_tier: dict[Tier, int]) -> dict[str, float]:
    """What shares came out, from the bytes that were placed."""
    total = sum(bytes_per_tier.values())
    return {str(tier): (bytes_per_tier.get(tier, 0) / total if total else 0.0) for tier in Tier}
