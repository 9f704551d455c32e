"""The units of a plan: where each lives, where it is computed, and what it takes."""

from __future__ import annotations

from collections.abc import Collection

from flexgen_bench.core.model import DType
from flexgen_bench.core.pipeline import Stage
from flexgen_bench.core.policy import ExpertLoads, Offloaded, Policy
from flexgen_bench.core.tiers import Site, Tier
from flexgen_bench.models.packing import PackedModel, PackedUnit
from flexgen_bench.models.parts import MLP, Decoder, Experts, Layer
from flexgen_bench.schedule.placement import place_units
from flexgen_bench.schedule.scheduled_job import Unit, UnitKind


def unit_tiers(packed: PackedModel, policy: Policy, stage: Stage | None = None) -> list[Tier]:
    """Where each unit lives. A tied head lives with the embedding, whose token table it reads.

    stage: what of the model a rank has: the shares are of that, and units that it does not have are said to be on disk.
    """
    if stage is not None:
        return _tiers_of_stage(packed, policy, stage)
    experts = [u.home_bytes for u in packed.units if u.kind is UnitKind.EXPERTS]
    sweep = [u for u in packed.units if u.kind is not UnitKind.EXPERTS]
    sizes = [sweep[0].home_bytes + (sweep[-1].home_bytes if packed.tied else 0)]
    sizes += [u.home_bytes for u in sweep[1:-1]]
    if not packed.tied:
        sizes.append(sweep[-1].home_bytes)
    tiers = place_units(sizes, policy.weights)
    if packed.tied:
        tiers.append(tiers[0])
    return tiers if policy.experts is None else tiers + place_units(experts, policy.experts)


def is_own(unit: PackedUnit, packed: PackedModel, stage: Stage | None) -> bool:
    """Whether a rank has a unit; experts go with their layer."""
    if stage is None:
        return True
    number = unit.companion if unit.kind is UnitKind.EXPERTS else unit.index
    return stage.holds(number, packed.head.index - 1)


def home_bytes(unit: PackedUnit, packed: PackedModel, stage: Stage | None) -> int:
    """What a unit takes where it lives; nothing if another rank has it. A tied head without the embedding has the token
    table for itself."""
    if not is_own(unit, packed, stage):
        return 0
    alone = unit.kind is UnitKind.HEAD and packed.tied and stage is not None and not stage.is_first
    return unit.num_bytes if alone else unit.home_bytes


def _tiers_of_stage(packed: PackedModel, policy: Policy, stage: Stage) -> list[Tier]:
    tiers = [Tier.DISK] * len(packed.units)
    of_experts = () if policy.experts is None else (UnitKind.EXPERTS,)
    for kinds, placement in (
        ((UnitKind.EMBED, UnitKind.LAYER, UnitKind.HEAD), policy.weights),
        (of_experts, policy.experts),
    ):
        own = [u for u in packed.units if u.kind in kinds and is_own(u, packed, stage)]
        with_embedding = packed.tied and stage.is_first and stage.is_last
        placed = [u for u in own if not (with_embedding and u.kind is UnitKind.HEAD)]
        if placement is not None:
            sizes = [home_bytes(u, packed, stage) for u in placed]
            for unit, tier in zip(placed, place_units(sizes, placement), strict=True):
                tiers[unit.index] = tier
    return tiers


def planned_unit(
    decoder: Decoder,
    unit: PackedUnit,
    tier: Tier,
    policy: Policy,
    compute: Site,
    rings: Collection[int],
    elsewhere: bool = False,
    slices: int = 1,
) -> Unit:
    """A unit that lives on a tier, for the generator. compute: the site that computes, unless units stay; rings:
    windows of which caches keep no more; elsewhere: another rank has it; slices: ranks that share every layer."""
    # The head, too; of the embedding only rows are moved anyway.
    stays = unit.kind is not UnitKind.EMBED and policy.offloaded is Offloaded.IN_PLACE
    site = compute.host if stays and tier is not Tier.GPU else compute
    before, after, window, sums, output = 2 * unit.num_values, 0, None, 0, 0
    apart, part = unit.kind is UnitKind.EXPERTS, None
    if unit.kind.repeats:
        layer = decoder.layers[(unit.companion if apart else unit.index) - 1]
        part = layer.mlp if apart or unit.companion < 0 else None
        # Where experts are apart, those that a token does not meet are not in the layer's unit to begin with.
        before, after = layer.flops(unit.num_values + (layer.idle_values if unit.companion >= 0 else 0))
        window = layer.attention.mod.window
        if slices > 1:
            sums, output = layer.sums, 2 * layer.attention.rows["q"] * layer.hidden
    experts, top_k, values = _of_mixture(part, decoder.hidden)
    if apart:
        before, after, window = 0, 2 * top_k * values, None
    return Unit(
        index=unit.index,
        kind=unit.kind,
        tier=tier,
        load_bytes=unit.num_bytes,
        site=site,
        flops_before=before,
        flops_after=after,
        window=window,
        ring=window if window in rings else None,
        # A processor unpacks tile by tile inside a product; an accelerator once for all micro-batches.
        # (Experts are: each meets few tokens, and those of all units unpacked would be the larger part of a model.)
        unpack=(
            policy.lossy.weights is not None
            and site.is_accelerator
            and unit.plain_bytes > 0
            and not apart
            and not elsewhere
        ),
        companion=unit.companion,
        experts=experts,
        top_k=top_k,
        expert_values=values,
        on_demand=apart and policy.expert_loads is ExpertLoads.TOUCHED,
        elsewhere=elsewhere,
        sums=sums,
        flops_output=output,
    )


def _of_mixture(part: MLP | Experts | None, hidden: int) -> tuple[int, int, int]:
    """Experts, how many of them a token goes to, and weights of one; zeros for what has none."""
    if not isinstance(part, Experts):
        return 0, 0, 0
    return part.count, part.router.top_k, part.expert.num_values(hidden)


def routed_row_bytes(layer: Layer, dtype: DType) -> int:
    """What experts read of a token: its values, and of each of its experts the number (64 bits) and the weight."""
    return layer.hidden * dtype.bytes + layer.mlp.router.top_k * 12 if isinstance(layer.mlp, Experts) else 0
