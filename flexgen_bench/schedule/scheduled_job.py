"""What the step generator is told about a job: the units of the model, where each is computed, and what moves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from flexgen_bench.core.pipeline import Stage
from flexgen_bench.core.policy import AttentionSite
from flexgen_bench.core.tiers import Site, Tier
from flexgen_bench.core.units import aligned
from flexgen_bench.schedule.micro_batch import Part


class UnitKind(StrEnum):
    EMBED = "embed"
    LAYER = "layer"
    EXPERTS = "experts"  # of a layer, where they are placed apart from the rest of it
    HEAD = "head"

    @property
    def repeats(self) -> bool:
        """Whether there are as many as the model is deep."""
        return self in (UnitKind.LAYER, UnitKind.EXPERTS)


@dataclass(frozen=True)
class Unit:
    """A schedulable piece of the model. ``load_bytes`` is what one load moves (0: nothing to load).

    tier: where it lives; gpu means the accelerator that computes it. site: where it is computed.
    flops_before and flops_after are of one token's matrix products before the attention and after it. unpack: its
    weights are compressed and unpacked by a step of their own. window: how many tokens a query sees, itself among them;
    None: all before it. ring: the window, if the cache keeps no other tokens; None: it keeps every one. companion: of a
    layer, the number of the unit of its experts, where these are placed apart (-1: they are not); of experts, that of
    their layer. experts, top_k: how many experts it has, and how many of them each token is routed to; expert_values:
    weights of one. on_demand: of its experts only those that are touched are loaded, once they are known. elsewhere:
    another rank has it and computes it; here it takes nothing. sums: of a layer that ranks share, how often they add up
    what each has made (0: none share it); flops_output: of ``flops_after``, what comes before the first of these sums.
    """

    index: int
    kind: UnitKind
    tier: Tier
    load_bytes: int
    site: Site
    flops_before: int = 0
    flops_after: int = 0
    unpack: bool = False
    window: int | None = None
    ring: int | None = None
    companion: int = -1
    experts: int = 0
    top_k: int = 0
    expert_values: int = 0
    on_demand: bool = False
    elsewhere: bool = False
    sums: int = 0
    flops_output: int = 0

    @property
    def path(self) -> tuple[Site, ...]:
        """The sites it passes through in every pass, its own last; empty if it is used where it lives."""
        if self.tier is self.site.tier or not self.load_bytes or self.elsewhere:
            return ()
        if self.tier is Tier.DISK and self.site.is_accelerator:
            return (self.site.host, self.site)
        return (self.site,)

    @property
    def is_streamed(self) -> bool:
        """Whether all of it must be brought to its site in every pass."""
        return bool(self.path) and not self.on_demand

    @property
    def expert_bytes(self) -> int:
        """What one expert takes: all take the same."""
        return self.load_bytes // self.experts

    @property
    def expert_flops(self) -> int:
        """Of one token through its experts."""
        return 2 * self.top_k * self.expert_values

    def touched(self, rows: int) -> float:
        """How many of its experts so many tokens are expected to be routed to, if routing is uniform."""
        return self.experts * (1 - (1 - self.top_k / self.experts) ** rows)


@dataclass(frozen=True)
class WeightBuffer:
    """A staging buffer for units of one kind, as large as the largest of them."""

    kind: UnitKind
    bytes: int


@dataclass(frozen=True)
class ScheduledJob:
    """A planned job for the generator.

    weight_buffers: staging buffers for streamed layers where they are computed, and as many in host memory for those on
    disk when an accelerator computes; as many again for experts that are placed apart.
    dequantized_buffers: room for unpacked weights, of dequantized_buffer_bytes each. packed_rows: in passes whose
    micro-batches have no more rows than this, compressed weights are used as they are (``kernels/fused_product.py``).
    num_buffers: staging buffers for what belongs to a micro-batch; at least two, since one is attended while the next
    is projected. keep_kv is False for jobs that never decode (scoring): nothing is cached then. The *_bytes give steps
    their bytes. device: number of the accelerator (of the host, where there is none). units: of the whole model, in the
    order of their numbers; ``sweep`` is the order of a pass. stage: what this rank computes of them; None: all.
    slices: how many ranks share every layer, each with a slice of it; ``units`` are of this rank's.
    """

    units: tuple[Unit, ...]
    compute_tier: Tier
    attention: AttentionSite
    weight_buffers: int
    num_buffers: int
    hidden_row_bytes: int
    embed_row_bytes: int
    qkv_row_bytes: int
    attention_row_bytes: int
    logits_row_bytes: int
    # score and value products of one query token against one cached token
    attention_flops_per_pair: int
    keep_kv: bool = True
    dequantized_buffers: int = 0
    dequantized_buffer_bytes: int = 0
    device: int = 0
    routed_row_bytes: int = 0
    packed_rows: int = 0
    stage: Stage | None = None
    slices: int = 1

    @cached_property
    def own(self) -> tuple[Unit, ...]:
        """The units that this rank has: without a stage, all."""
        return tuple(u for u in self.units if not u.elsewhere)

    @cached_property
    def sweep(self) -> tuple[Unit, ...]:
        """What a pass goes through one after the other: embedding, layers, head. Experts belong to their layers."""
        return tuple(u for u in self.own if u.kind is not UnitKind.EXPERTS)

    @cached_property
    def first_layer(self) -> int:
        """The number of the layer that a pass comes to first."""
        return next(unit.index for unit in self.sweep if unit.kind is UnitKind.LAYER)

    @property
    def waves(self) -> int:
        """Passes that are under way at once, each over KV slots of its own: one for every rank."""
        return 1 if self.stage is None else self.stage.ranks

    @cached_property
    def entry(self) -> Unit | None:
        """The layer that hidden states of the rank before come to; None on the first rank, which embeds tokens."""
        return None if self.stage is None or self.stage.is_first else self.sweep[0]

    @cached_property
    def exit(self) -> Unit | None:
        """The layer whose hidden states go to the next rank; None on the last rank, which makes logits."""
        return None if self.stage is None or self.stage.is_last else self.sweep[-1]

    def experts_of(self, unit: Unit) -> Unit | None:
        """The experts of a layer, where these are placed apart."""
        return self.units[unit.companion] if unit.companion >= 0 else None

    @cached_property
    def site(self) -> Site:
        """The device that computes, in place or not; what a tier of the policy means is a memory of it or of its
        host."""
        return Site(self.compute_tier, self.device)

    def site_of(self, tier: Tier) -> Site:
        """The memory that a tier means in this job."""
        return self.site if tier is self.compute_tier else Site(tier, self.site.host.device)

    @property
    def has_accelerator(self) -> bool:
        return self.compute_tier is Tier.GPU

    @cached_property
    def tokens_stay(self) -> bool:
        """Whether a new token goes from the head to the embedding without the host: both live on the accelerator, which
        computes all that is between them. Then no pass waits until the host has seen the tokens of the one before."""
        outer = {unit.tier for unit in self.units if unit.kind in (UnitKind.EMBED, UnitKind.HEAD)}
        # Else the first rank embeds and the last one chooses, or every rank does both, each for itself.
        is_whole = self.stage is None and self.slices == 1
        return (
            is_whole and self.keep_kv and outer == {Tier.GPU} and all(unit.site.is_accelerator for unit in self.units)
        )

    @cached_property
    def rings(self) -> dict[int | None, tuple[Unit, ...]]:
        """The layers by what their caches keep (``Unit.ring``)."""
        layers = [unit for unit in self.own if unit.kind is UnitKind.LAYER]
        kinds = dict.fromkeys(unit.ring for unit in layers)
        return {ring: tuple(unit for unit in layers if unit.ring == ring) for ring in kinds}

    @cached_property
    def streamed(self) -> tuple[Unit, ...]:
        """Units that must be brought to where they are computed in every pass, in the order of their use."""
        used = (u for unit in self.sweep for u in (unit, self.experts_of(unit)) if u is not None)
        return tuple(u for u in used if u.is_streamed)

    @cached_property
    def buffers(self) -> dict[Site, tuple[WeightBuffer, ...]]:
        """Staging buffers of weights on every site where there are any.

        Layers share ``weight_buffers`` of them, and so do experts that are placed apart. The embedding and the head,
        which are often larger, have one each: it costs no more memory than buffers that hold anything would, and the
        head can be on its way while every layer buffer is in use. Experts that are loaded on demand have one, too:
        nobody knows which are needed next before the ones in use have been computed.
        """
        by_site: dict[Site, tuple[WeightBuffer, ...]] = {}
        for site in sorted({site for u in self.own for site in u.path}):
            passing = [u for u in self.own if site in u.path]
            buffers: list[WeightBuffer] = []
            for kind in UnitKind:
                largest = max((u.load_bytes for u in passing if u.kind is kind), default=0)
                if largest:
                    buffers += [WeightBuffer(kind, largest)] * (self.buffers_for(kind))
            if buffers:
                by_site[site] = tuple(buffers)
        return by_site

    def pieces(self, unit: Unit) -> tuple[tuple[int, int], ...]:
        """Byte ranges in which a streamed unit is loaded, in whole pages.

        A head that is larger than a layer comes in pieces of about a layer's size, spread over the pass: as one piece
        it would keep the link for so long that the layers in their buffers are computed and the next are not there.
        """
        if unit.kind is not UnitKind.HEAD or not self._largest_layer:
            return ((0, unit.load_bytes),)
        count = -(-unit.load_bytes // self._largest_layer)
        size = aligned(-(-unit.load_bytes // count))
        return tuple((start, min(start + size, unit.load_bytes)) for start in range(0, unit.load_bytes, size))

    @cached_property
    def _largest_layer(self) -> int:
        return max((u.load_bytes for u in self.streamed if u.kind is UnitKind.LAYER), default=0)

    def buffers_for(self, kind: UnitKind) -> int:
        """Staging buffers that units of a kind share, on one site."""
        if kind is UnitKind.EXPERTS and self.units[-1].on_demand:
            return 1
        return self.weight_buffers if kind.repeats else 1

    def kv_tier(self, unit: Unit, part: Part) -> Tier:
        """Where a part's cache of this layer lives: never above the site that computes the layer."""
        if part.tier is Tier.GPU and not unit.site.is_accelerator:
            return Tier.CPU
        return part.tier

    @cached_property
    def delegates_attention(self) -> bool:
        """Whether the cpu attends for layers that an accelerator computes, where their cache is not on it."""
        return self.attention is AttentionSite.CPU and any(
            u.kind is UnitKind.LAYER and u.site.is_accelerator for u in self.own
        )

    def attends_at(self, unit: Unit) -> tuple[Site, ...]:
        """Where attention of a layer may be computed: with its other steps, and on the host where that is delegated."""
        delegated = self.attention is AttentionSite.CPU and unit.site.is_accelerator
        return (unit.site, unit.site.host) if delegated else (unit.site,)

    def attends_on_cpu(self, unit: Unit, part: Part) -> bool:
        """Decode attention of this part runs on the cpu although an accelerator computes the rest."""
        return unit.site.is_accelerator and part.span.is_delegated
