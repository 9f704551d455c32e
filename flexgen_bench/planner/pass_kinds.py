"""Which passes of a job are worth playing: passes of a kind take times that lie on a line over what they have to do.

A pass's kind is which micro-batches it has, in which phase, whether it comes after a prefill, and whether a cache's
tail is written in it. Within a kind only the numbers of sequences and of cached tokens change, slowly, so a few are
simulated and the times of the others read off the line between them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.schedule.micro_batch import Member, MicroBatch
from flexgen_bench.schedule.scheduler import Scheduler

# Passes of a kind that are simulated at most: the least, the most, and what lies between. Of kinds that are few of all
# passes, fewer.
POINTS = 4
SHARE = 16  # a kind gets a second point if it is a 16th of all passes, or of all there is to do
# A row that is computed costs about as much as attending to so many cached tokens; only the order of passes depends on
# it.
_ROW_TOKENS = 1000
# Simulated passes and their weights, by number: the time of a pass is the weighted sum of theirs.
Mix = Mapping[int, float]


class PassKind(NamedTuple):
    """kind: passes alike in it are alike; amount: how much there is to do."""

    kind: tuple[Any, ...]
    amount: int


def pass_kinds(plan: MemoryPlan) -> list[PassKind]:
    """Of every pass of a job (of several ranks, of its first wave) in which no sequence ends early."""
    return list(_kinds(Scheduler(plan.policy, plan)))


def coarse_kinds(plan: MemoryPlan) -> list[PassKind]:
    """Only told apart by whether there are prompts and whether there is decoding in them: to compare policies by a few
    passes."""
    scheduler, kinds = Scheduler(plan.policy, plan), []
    while scheduler.has_work(0):
        scheduler.admit()
        starting = [r.group for r in scheduler.running if not r.token]
        decoding = [Member(r.group, r.token) for r in scheduler.running if r.token]
        rows = sum(sum(c.prompt_lens) - c.shared * (c.size - 1) for c in starting)
        rows += sum(member.group.size for member in decoding)
        amount = sum(map(_cached, decoding)) + _ROW_TOKENS * rows
        tails = any(map(_has_tail, decoding))
        kinds.append(PassKind((bool(starting), bool(decoding), tails), amount))
        scheduler.postprocess()
    return kinds


def mixes(passes: list[PassKind], points: int = POINTS) -> list[Mix]:
    """For every pass, of which simulated ones its time is made; a simulated one is made of itself."""
    of_kind: dict[tuple[object, ...], dict[int, int]] = {}  # kind -> amount -> first pass with it
    counts, amounts = Counter(one.kind for one in passes), Counter[object]()
    for number, one in enumerate(passes):
        of_kind.setdefault(one.kind, {}).setdefault(one.amount, number)
        amounts[one.kind] += one.amount
    simulated = {}
    for kind, known in of_kind.items():
        share = max(counts[kind] / len(passes), amounts[kind] / amounts.total())
        simulated[kind] = _spread(sorted(known.items()), min(points, 1 + int(share * SHARE)))
    return [_between(simulated[one.kind], one.amount) for one in passes]


def _kinds(scheduler: Scheduler) -> Iterator[PassKind]:
    after_prefill: bool | None = None
    while scheduler.has_work(0):
        batches = scheduler.schedule()
        own, amount = kind_of(batches)
        scheduler.postprocess()
        yield PassKind((own, after_prefill, scheduler.is_done), amount)
        after_prefill = all(batch.is_prefill for batch in batches)


def kind_of(batches: Sequence[MicroBatch]) -> PassKind:
    """Of a pass over these micro-batches, wherever in a job it is."""
    own = ((batch.is_prefill, batch.chunk, len(batch.logit_rows) > 0, _writes_tail(batch)) for batch in batches)
    return PassKind(tuple(own), sum(map(_amount, batches)))


def _amount(batch: MicroBatch) -> int:
    attended = sum(_cached(member) for member in batch.members if member.token)
    return attended + _ROW_TOKENS * batch.rows


def _cached(member: Member) -> int:
    return sum(member.group.prompt_lens) + member.group.size * member.token


def _writes_tail(batch: MicroBatch) -> bool:
    """Whether a part of a cache on disk has a segment to write."""
    return any(map(_has_tail, batch.members))


def _has_tail(member: Member) -> bool:
    group, token = member.group, member.token
    return token > 0 and any(
        span.tier is Tier.DISK and span.count and layout.num_segments and token % layout.segment_tokens == 0
        for layouts in (group.layouts, *group.rings.values())
        for span, layout in zip(group.kv, layouts, strict=True)
    )


def _spread(known: list[tuple[int, int]], points: int) -> list[tuple[int, int]]:
    """At most ``points`` of (amount, pass), in order of amount, from end to end."""
    if len(known) <= points:
        return known
    if points == 1:
        return [known[len(known) // 2]]
    places = {round(i * (len(known) - 1) / (points - 1)) for i in range(points)}
    return [known[place] for place in sorted(places)]


def _between(simulated: list[tuple[int, int]], amount: int) -> Mix:
    place = bisect_right([known for known, _ in simulated], amount)
    if place in (0, len(simulated)):  # beyond the ends, as at the ends
        return {simulated[max(0, place - 1)][1]: 1.0}
    low, high = simulated[place - 1], simulated[place]
    share = (amount - low[0]) / (high[0] - low[0])
    return {low[1]: 1 - share, high[1]: share} if share else {low[1]: 1.0}
