"""What the step generator is told about a job: the units of the model, where each is computed, and what moves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from flexgen_bench.core.policy import AttentionSite
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.schedule.micro_batch import Part


class UnitKind(StrEnum):
    EMBED = "embed"
    LAYER = "layer"
    HEAD = "head"


@dataclass(frozen=True)
class Site:
    """Where a unit is computed: the tier whose memory its steps work on, and the lane they run on."""

    tier: Tier

    @property
    def lane(self) -> Lane:
        return Lane.GPU if self.tier is Tier.GPU else Lane.CPU

    @property
    def is_accelerator(self) -> bool:
        return self.tier is Tier.GPU


@dataclass(frozen=True)
class Unit:
    """A schedulable piece of the model. ``load_bytes`` is what one load moves (0: nothing to load).

    flops_per_token are the matrix products before the attention and after it. unpack: its weights are compressed and unpacked
    by a step of their own.
    """

    index: int
    kind: UnitKind
    tier: Tier
    load_bytes: int
    site: Site
    flops_before: int = 0
    flops_after: int = 0
    unpack: bool = False

    @property
    def is_streamed(self) -> bool:
        """Whether it must be brought to its site in every pass."""
        if self.tier is self.site.tier or not self.load_bytes:
            return False
        return not (self.site.tier is Tier.CPU and self.tier is Tier.GPU)


@dataclass(frozen=True)
class Job:
    """A whole job for the generator.

    weight_slots: staging slots for streamed units where they are computed, and as many in host memory for units on disk when an
    accelerator computes. plain_slots: room for unpacked weights, of plain_slot_bytes each. stages: staging slots for what belongs to a
    micro-batch; at least two, since one is attended while the next is projected. keep_kv is False for jobs that never decode (scoring):
    nothing is cached then. The *_bytes give steps their bytes.
    """

    units: tuple[Unit, ...]
    compute_tier: Tier
    attention: AttentionSite
    weight_slots: int
    stages: int
    hidden_row_bytes: int
    embed_row_bytes: int
    qkv_row_bytes: int
    attention_row_bytes: int
    logits_row_bytes: int
    # score and value products of one query token against one cached token
    attention_flops_per_pair: int
    keep_kv: bool = True
    plain_slots: int = 0
    plain_slot_bytes: int = 0

    @property
    def compute_lane(self) -> Lane:
        return Lane.CPU if self.compute_tier is Tier.CPU else Lane.GPU

    @property
    def has_accelerator(self) -> bool:
        return self.compute_tier is Tier.GPU

    @cached_property
    def streamed(self) -> tuple[Unit, ...]:
        """Units that must be brought to where they are computed in every pass, in order."""
        return tuple(u for u in self.units if u.is_streamed)

    @cached_property
    def slot_bytes(self) -> dict[Tier, int]:
        """How large a staging slot of weights must be, on every tier where there are any."""
        passing = {
            self.compute_tier: [u for u in self.streamed if u.site.tier is self.compute_tier]
        }
        if self.has_accelerator:
            passing[Tier.CPU] = [u for u in self.streamed if u.tier is Tier.DISK]
        return {tier: max(u.load_bytes for u in units) for tier, units in passing.items() if units}

    def kv_tier(self, unit: Unit, part: Part) -> Tier:
        """Where a part's cache of this layer lives: never above the site that computes the layer."""
        if part.tier is Tier.GPU and not unit.site.is_accelerator:
            return Tier.CPU
        return part.tier

    def attends_on_cpu(self, unit: Unit, part: Part) -> bool:
        """Decode attention of this part runs on the cpu although an accelerator computes the rest."""
        return (
            unit.site.is_accelerator
            and part.tier is not Tier.GPU
            and self.attention is AttentionSite.CPU
        )
