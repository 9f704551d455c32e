"""One sentence on why a policy is what it is: what bounds it, what lies where, and what the next best way of working
would lose. From the plan's own figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.policy import AttentionSite, ExpertLoads, Offloaded, Policy, Schedule
from flexgen_bench.core.tiers import Lane, LaneKind, Tier
from flexgen_bench.core.units import format_bytes
from flexgen_bench.planner.forecast import Forecast
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.planner.search_space import SearchSpace
from flexgen_bench.schedule.scheduled_job import UnitKind

_LANES = {
    LaneKind.DISK_READ: "reading from disk",
    LaneKind.DISK_WRITE: "writing to disk",
    LaneKind.H2D: "the link to the gpu",
    LaneKind.D2H: "the link from the gpu",
    LaneKind.GPU: "the gpu",
    LaneKind.CPU: "the processor",
    LaneKind.NET_OUT: "the link to other ranks",
    LaneKind.NET_IN: "the link from other ranks",
}
_TIERS = {Tier.GPU: "gpu memory", Tier.CPU: "host memory", Tier.DISK: "disk"}
_PLACED = (("weights", "weights"), ("experts", "experts"), ("KV cache", "kv_cache"), ("hidden states", "activations"))
_WAITS = 0.7  # a lane that is busy for less of a job is not what bounds it alone
_HARDLY = 0.005  # of the speed: what loses less is as good
_SOME = 0.02  # a share of the cache on the gpu that is another way of working
_SHOWS = 0.005  # a difference in shares that shows when they are printed


@dataclass(frozen=True)
class Alternative:
    """The fastest policy that was simulated and works in another way. part: of the speed of the one chosen, both judged
    alike."""

    policy: Policy
    part: float
    busy: Mapping[Lane, float]


def way_of_working(policy: Policy) -> object:
    """What makes two policies ways of working that have to be explained apart. Where nothing is below the gpu, what
    would be done with it there makes no difference."""
    weights, experts = policy.weights, policy.experts or policy.weights
    return (
        policy.schedule,
        policy.attention if policy.kv_cache.gpu < 1 else AttentionSite.COMPUTE,
        policy.kv_moved > 0,
        policy.offloaded if min(weights.gpu, experts.gpu) < 1 else Offloaded.MOVE,
        policy.expert_loads if experts.gpu < 1 else ExpertLoads.ALL,
        policy.lossy,
        policy.kv_cache.share(Tier.GPU) > _SOME,
        policy.lowest_tier is Tier.DISK,
    )


def busy_shares(times: Forecast, hardware: HardwareProfile) -> dict[Lane, float]:
    """Of the job's time, by link or processor, 1 at most: of a link what its bytes take, as lanes that share it are
    both busy while they do. Of few simulated passes, whose loads were ahead, that may look like more."""
    busy, moved = times.busy_s(), times.moved_bytes()
    shares = dict.fromkeys((lane.link for lane in hardware.lanes), 0.0)
    for lane, seconds in busy.items():
        rate = hardware.link_rate(lane) if lane.is_link else None
        share = (moved.get(lane, 0) / rate if rate else seconds) / times.total_s
        shares[lane.link] = shares.get(lane.link, 0.0) + share
    return {link: min(1.0, share) for link, share in shares.items()}


def _name(lane: Lane) -> str:
    return _LANES[lane.kind] + (f" ({lane.name})" if lane.device else "")


def why(space: SearchSpace, plan: MemoryPlan, times: Forecast, other: Alternative | None) -> str:
    """The sentence. other: what it is compared with; None: nothing else was tried."""
    parts = [_bound(busy_shares(times, plan.hardware)), *_placed(space, plan)]
    if other is not None:
        parts.append(_loses(plan.policy, other))
    return "; ".join(parts)


def _bound(busy: Mapping[Lane, float]) -> str:
    (first, most), (second, less) = sorted(busy.items(), key=lambda one: -one[1])[:2]
    if most >= _WAITS:
        return f"bound by {_name(first)}, busy {most:.0%} of the job ({_name(second)}: {less:.0%})"
    return (
        f"no part is busy all the time: {_name(first)} {most:.0%} of the job, {_name(second)} {less:.0%}; "
        "steps wait for each other"
    )


def _placed(space: SearchSpace, plan: MemoryPlan) -> Iterator[str]:
    policy, here = plan.policy, plan.job.site.tier
    capacity = space.capacity(here)
    left = capacity - plan.total(here, plan.job.device)
    held = {site.tier: parts.get("weights", 0) for site, parts in plan.bytes.items()}
    text = _lies("weights", held)
    if _away(held, here) > left:
        there = f"the {_TIERS[here]} of {format_bytes(round(capacity))} has room for"
        text += f", more than {there}{'' if sum(held.values()) > capacity else ' beside the rest'}"
    yield text
    if policy.experts is not None:
        yield _of_experts(plan, here)
    cache = {site.tier: parts.get("kv_cache", 0) for site, parts in plan.bytes.items()}
    if sum(cache.values()):
        text = _lies(f"the KV cache of {policy.block_size} sequences", cache)
        text += ", more than fits beside them" if _away(cache, here) > left else ""
        if _away(cache, here) and here is Tier.GPU:
            text += _attended(plan, cache)
        yield text


def _attended(plan: MemoryPlan, cache: Mapping[Tier, int]) -> str:
    """Where what is not on the gpu is attended to. cache: its bytes."""
    layers = [unit for unit in plan.job.units if unit.kind is UnitKind.LAYER]
    if not any(unit.site.is_accelerator for unit in layers):
        return ", where the processor computes the layers"
    if plan.policy.attention is AttentionSite.COMPUTE:
        here = all(unit.site.is_accelerator for unit in layers)
        return f", and is moved to the gpu for every token{'' if here else ' of the layers that it computes'}"
    text = ", and the processor attends to it there"
    moved = plan.realised_kv_moved * cache.get(Tier.CPU, 0) / sum(cache.values())
    return f"{text}, but for {moved:.0%} of the cache that is moved to the gpu" if moved else text


def _of_experts(plan: MemoryPlan, here: Tier) -> str:
    held = {site.tier: parts.get("experts", 0) for site, parts in plan.bytes.items()}
    text = _lies("experts", held)
    if not _away(held, here):
        return text
    if plan.policy.offloaded is Offloaded.IN_PLACE:
        return f"{text}, computed where they lie"
    return f"{text}, of which those that are touched are loaded" if plan.job.units[-1].on_demand else text


def _lies(what: str, held: Mapping[Tier, int]) -> str:
    total = sum(held.values())
    used = [(tier, size) for tier, size in held.items() if size]
    places = ", ".join(
        (f"{size / total:.0%} " if len(used) > 1 else "") + f"in {_TIERS[tier]}".replace("in disk", "on disk")
        for tier, size in used
    )
    return f"{what} ({format_bytes(total)}) {places}"


def _away(held: Mapping[Tier, int], here: Tier) -> int:
    """Bytes that are not where they are used."""
    return sum(held.values()) - held.get(here, 0)


def _loses(policy: Policy, other: Alternative) -> str:
    differences = ", ".join(_differences(policy, other.policy)) or "smaller steps alike"
    lane, most = max(other.busy.items(), key=lambda one: one[1])
    if abs(1 - other.part) < _HARDLY:
        return f"as good within {_HARDLY:.1%}: {differences}"
    lost = f"{1 - other.part:.0%}" if 1 - other.part >= 0.01 else f"{1 - other.part:.1%}"
    return f"the next best way ({differences}) is {lost} slower: {_name(lane)} would be busy {most:.0%}"


def _differences(policy: Policy, other: Policy) -> Iterator[str]:
    """What the other does otherwise."""
    if other.schedule is not policy.schedule:
        yield f"{'block by block' if other.schedule is Schedule.BLOCK else 'continuous schedule'}"
    if other.attention is not policy.attention and other.kv_cache.gpu < 1:
        yield f"attention on the {'processor' if other.attention is AttentionSite.CPU else 'gpu'}"
    # Where the gpu attends, all of it is moved, which the line before has said.
    if other.attention is AttentionSite.CPU and abs(other.kv_moved - policy.kv_moved) > _SHOWS:
        yield f"{other.kv_moved:.0%} of the cache in host memory moved" if other.kv_moved else "none of the cache moved"
    experts = other.experts or other.weights
    if other.offloaded is not policy.offloaded and min(other.weights.gpu, experts.gpu) < 1:
        here = other.offloaded is Offloaded.IN_PLACE
        yield f"offloaded layers {'computed where they lie' if here else 'moved to the gpu'}"
    if other.expert_loads is not policy.expert_loads and experts.gpu < 1:
        yield f"{'touched' if other.expert_loads is ExpertLoads.TOUCHED else 'all'} experts loaded"
    if other.lossy != policy.lossy:
        yield str(other.lossy)
    apart = policy.experts is not None or other.experts is not None
    for name, kind in _PLACED:
        if kind == "experts" and not apart:
            continue
        # Experts that have no placement of their own lie with their layers.
        mine, its = (one.placements.get(kind, one.weights) for one in (policy, other))
        if any(abs(mine.share(tier) - its.share(tier)) > _SHOWS for tier in Tier):
            shares = [f"{its.share(t):.0%} {t}" for t in Tier if its.share(t) > _SHOWS]
            yield f"{name} {' + '.join(shares)}"
    if other.block_size != policy.block_size:
        yield f"blocks of {other.block_size}"
