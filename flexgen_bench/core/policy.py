"""Everything the engine may choose: batch shape, placement, prefetch, attention device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from flexgen_bench.core.codec import OMITTED, from_json
from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.tiers import Tier


class AttentionSite(StrEnum):
    """Where decode attention over a KV cache on the cpu or disk tier is computed."""

    COMPUTE = "compute"  # the KV cache is moved to the compute device
    CPU = "cpu"  # queries are moved to the cpu, the KV cache stays


class Schedule(StrEnum):
    """When micro-batches of a job start."""

    BLOCK = "block"  # a block prefills together, decodes together, and ends before the next one starts
    CONTINUOUS = "continuous"  # a new micro-batch starts as soon as there is room, beside older ones that decode


class Offloaded(StrEnum):
    """Where decoder layers, their experts and the head are computed if they do not live on the compute tier."""

    MOVE = "move"  # their weights are moved to the compute device in every pass
    IN_PLACE = "in_place"  # on the cpu, where they lie: for few sequences, where moving is slower


class ExpertLoads(StrEnum):
    """Which experts of a mixture's layer are loaded, where these have a placement of their own."""

    ALL = "all"  # once a pass, ahead of their use, for all micro-batches
    TOUCHED = "touched"  # those that a micro-batch's tokens have been routed to: for few sequences


@dataclass(frozen=True)
class Placement:
    """Shares of one tensor kind on each tier, in 0..1, summing to one."""

    gpu: float = 0.0
    cpu: float = 0.0
    disk: float = 0.0

    def __post_init__(self) -> None:
        for tier in Tier:
            share = self.share(tier)
            if not isinstance(share, int | float) or isinstance(share, bool) or not 0 <= share <= 1:
                raise UserError(f"placement.{tier}", share, "a share between 0 and 1")
        total = self.gpu + self.cpu + self.disk
        if abs(total - 1) > 1e-6:
            raise UserError(
                "placement",
                {str(tier): self.share(tier) for tier in Tier},
                f"shares that sum to 1 (these sum to {total:g})",
                "Shares are fractions, not percents.",
            )

    def share(self, tier: Tier) -> float:
        return float(getattr(self, tier.value))

    @property
    def lowest_tier(self) -> Tier:
        """The slowest tier that holds a part."""
        return max((t for t in Tier if self.share(t) > 0), key=list(Tier).index)

    @staticmethod
    def all_on(tier: Tier) -> Placement:
        return Placement(**{tier.value: 1.0})


@dataclass(frozen=True)
class Policy:
    """How a job is run. ``block_size`` sequences share every weight load.

    gpu_batch_size: sequences computed together (one micro-batch).
    num_gpu_batches: micro-batches that share one weight load; there is room for this many in the KV cache.
    weights, kv_cache, activations: placement of each tensor kind.
    schedule: block by block, or continuous.
    prefill_chunk: prompt tokens of a micro-batch computed at once; None is all of them. Bounds the workspace of long
    prompts.
    offloaded: whether layers below the compute tier are moved up or computed where they lie.
    lossy: compression and sparse attention. Nothing else here changes a result.
    experts: placement of the experts of a mixture, apart from the rest of their layers; None: with their layers.
    expert_loads: all of a layer's experts, or those that are touched.
    prefetch: staging slots for streamed layers; layer i+prefetch-1 loads while layer i computes. At least 1.
    overlap: lanes run concurrently; off is strictly one step after the other (for debugging and comparison).
    attention: where decode attention runs for KV that is not on the compute device.
    kv_moved: where the cpu attends, the share of the cache in host memory, in 0..1, that is moved to the compute device
    all the same: a micro-batch is attended to in several places at once, so that neither the link nor the cpu is alone.
    """

    gpu_batch_size: int = 8
    num_gpu_batches: int = 1
    weights: Placement = field(default_factory=lambda: Placement(cpu=1.0))
    kv_cache: Placement = field(default_factory=lambda: Placement(cpu=1.0))
    activations: Placement = field(default_factory=lambda: Placement(cpu=1.0))
    prefetch: int = 2
    overlap: bool = True
    attention: AttentionSite = AttentionSite.COMPUTE
    schedule: Schedule = Schedule.BLOCK
    prefill_chunk: int | None = None
    offloaded: Offloaded = Offloaded.MOVE
    lossy: Lossy = EXACT
    # What was not always there, where it says something: policies without it read and hash as they always did.
    experts: Placement | None = field(default=None, metadata=OMITTED)
    expert_loads: ExpertLoads = field(default=ExpertLoads.ALL, metadata=OMITTED)
    kv_moved: float = field(default=0.0, metadata=OMITTED)

    def __post_init__(self) -> None:
        for name, least in (("gpu_batch_size", 1), ("num_gpu_batches", 1), ("prefetch", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"policy.{name}", value, f"an integer of at least {least}")
        if not isinstance(self.overlap, bool):
            raise UserError("policy.overlap", self.overlap, "true or false")
        chunk = self.prefill_chunk
        if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
            raise UserError("policy.prefill_chunk", chunk, "an integer of at least 1, or null")
        choices: dict[str, type[StrEnum]] = {
            "attention": AttentionSite,
            "schedule": Schedule,
            "offloaded": Offloaded,
            "expert_loads": ExpertLoads,
        }
        for name, enum in choices.items():
            value = getattr(self, name)
            if value not in list(enum):
                raise unknown_choice(f"policy.{name}", value, enum)
            object.__setattr__(self, name, enum(value))
        self._check_moved()
        if not isinstance(self.lossy, Lossy):
            raise UserError("policy.lossy", self.lossy, "a Lossy")
        for name in ("weights", "kv_cache", "activations"):
            if not isinstance(getattr(self, name), Placement):
                raise UserError(f"policy.{name}", getattr(self, name), "a Placement")
        if self.experts is None:
            if self.expert_loads is not ExpertLoads.ALL:
                raise UserError(
                    "policy.expert_loads",
                    self.expert_loads.value,
                    "all where experts lie with their layers",
                    "Give them a placement of their own, as in policy.experts={cpu: 1}.",
                )
        elif not isinstance(self.experts, Placement):
            raise UserError("policy.experts", self.experts, "a Placement, or null")

    def _check_moved(self) -> None:
        moved = self.kv_moved
        if not isinstance(moved, int | float) or isinstance(moved, bool) or not 0 <= moved < 1:
            raise UserError(
                "policy.kv_moved",
                moved,
                "a share of at least 0 and below 1",
                "To move all of the cache, leave it out and set policy.attention=compute.",
            )
        if moved and self.attention is AttentionSite.COMPUTE:
            raise UserError(
                "policy.kv_moved",
                moved,
                "0 where policy.attention=compute: all of the cache in host memory is moved there",
                "Set policy.attention=cpu to have the cpu attend to the rest.",
            )

    @property
    def block_size(self) -> int:
        return self.gpu_batch_size * self.num_gpu_batches

    @property
    def lowest_tier(self) -> Tier:
        """The slowest tier that anything is on."""
        return max((p.lowest_tier for p in self.placements.values()), key=list(Tier).index)

    @property
    def placements(self) -> dict[str, Placement]:
        """Where each kind of tensor is, by the name of its field; without experts where these lie with their layers."""
        placed = {"weights": self.weights, "kv_cache": self.kv_cache, "activations": self.activations}
        return placed if self.experts is None else placed | {"experts": self.experts}

    def mixes_phases(self, prompts: int) -> bool:
        """Whether a job of so many prompts computes some of them while others decode, so that its two phases have no
        times of their own."""
        return self.schedule is Schedule.CONTINUOUS and prompts > self.gpu_batch_size

    @staticmethod
    def stated_in(settings: Mapping[str, Any]) -> Policy | None:
        """The policy that a system says it has run; None for settings that are no policy of ours, as those of other
        systems."""
        try:
            return from_json(Policy, settings, "policy") if settings else None
        except UserError:
            return None


def agreed_lossy(lossy: Lossy, policy: Policy | None) -> Lossy:
    """What may change the results: as the policy says, if there is one. UserError if ``lossy`` says otherwise."""
    if not isinstance(lossy, Lossy):
        raise UserError("lossy", lossy, "a Lossy")
    if policy is None:
        return lossy
    if lossy not in (EXACT, policy.lossy):
        raise UserError(
            "lossy",
            str(lossy),
            f"that of the policy ({policy.lossy}), where a policy is given",
            "Leave it out, or put it into the policy: Policy(..., lossy=...).",
        )
    return policy.lossy
