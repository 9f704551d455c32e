"""Every byte a job needs, per tier, before anything is allocated. The engine allocates from this plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flexgen_bench.core.errors import DoesNotFit, UserError
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.pipeline import Stage
from flexgen_bench.core.policy import AttentionSite, Policy
from flexgen_bench.core.score_mod import SCORES_AT_ONCE
from flexgen_bench.core.tiers import Site, Tier
from flexgen_bench.models.model import Model
from flexgen_bench.models.packing import PackedModel
from flexgen_bench.models.parts import Decoder
from flexgen_bench.planner.planned_units import home_bytes, is_own, planned_unit, routed_row_bytes, unit_tiers
from flexgen_bench.planner.rings import cached_tokens, gathered_tokens, ring_windows
from flexgen_bench.planner.staging import KVSlotBytes, Staging, all_slot_bytes, chunk_rows, everything, staging
from flexgen_bench.schedule.experts import are_away
from flexgen_bench.schedule.passes import chunk_len
from flexgen_bench.schedule.placement import realised
from flexgen_bench.schedule.scheduled_job import ScheduledJob, Unit, UnitKind
from flexgen_bench.schedule.sequence_group import SequenceGroup
from flexgen_bench.schedule.sequence_groups import Capacity, Request, SequenceGroups, form_groups
from flexgen_bench.schedule.steps import TOKEN_BYTES

# What products on compressed weights, and on a processor, take for tiles at a time; of a small model, the whole unit in
# float32.
KERNEL_BYTES = 16 * 1024 * 1024
# Of an accelerator's compressed weights that are multiplied with as they are (kernels/narrow_linear.py).
TILE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class MemoryPlan:
    """Of a model under a policy on a machine: bytes per site and part, the job for the generator, its sequence groups
    and KV slots, and the shares that came out."""

    model: Model = field(repr=False)
    policy: Policy = field(repr=False)
    hardware: HardwareProfile = field(repr=False)
    job: ScheduledJob
    groups: SequenceGroups
    kv_slots: tuple[KVSlotBytes, ...]
    staging: Staging
    bytes: Mapping[Site, Mapping[str, int]]
    realised_weights: Mapping[str, float]
    realised_kv_cache: Mapping[str, float]
    realised_activations: Mapping[str, float]
    realised_experts: Mapping[str, float] | None = None  # where they are placed apart

    def total(self, tier: Tier, device: int = 0) -> int:
        """Bytes on a tier of one device."""
        return sum(self.bytes.get(Site(tier, device), {}).values())

    @property
    def realised_kv_moved(self) -> float:
        """Of the bytes of the cache in host memory, the part that is moved to the accelerator in every decode pass:
        sequences are whole, and layers that the host computes read theirs in place."""
        cached = self.bytes[self.job.site_of(Tier.CPU)].get("kv_cache", 0)
        sizes = zip(self.kv_slots, self.groups.kv_slots, strict=True)
        return sum(one.moved(kv_slot, self.job) for one, kv_slot in sizes) / cached if cached else 0.0

    def check(self, available: Mapping[Tier, int]) -> None:
        """Raise DoesNotFit if a site is too small: the profile's capacity of its tier, or what is ``available`` there
        to a plan now."""
        for site, parts in self.bytes.items():
            tier = site.tier
            need = sum(parts.values())
            # Weights on disk are in the packed store already: they do not take from what is free.
            stored = parts.get("weights", 0) + parts.get("experts", 0) if tier is Tier.DISK else 0
            free = available.get(tier)
            limits = (self.hardware.capacity_bytes(tier), None if free is None else free + stored)
            capacity = min((limit for limit in limits if limit is not None), default=None)
            if capacity is not None and need > capacity:
                largest = sorted(parts.items(), key=lambda item: -item[1])
                named = ", ".join(f"{name} {count / 2**30:.2f} GiB" for name, count in largest if count)
                raise DoesNotFit(site.name, need, capacity, named, _REMEDY[tier])


_REMEDY = {
    Tier.GPU: "Lower policy.gpu_batch_size or policy.prefill_chunk, or move shares of weights, kv_cache or activations "
    "to cpu.",
    Tier.CPU: "Lower the block size, move shares of weights or kv_cache to disk, or raise gpu.cpu_memory.",
    Tier.DISK: "Free space in the offload directory, choose another with offload_dir, or keep more in memory.",
}


def plan_job(
    model: Model,
    policy: Policy,
    hardware: HardwareProfile,
    requests: Sequence[Request] | Capacity,
    logits_row_bytes: int = 8,
    scored_rows: int = 0,
    device: int = 0,
    stage: Stage | None = None,
) -> MemoryPlan:
    """Plan a job of these requests, or an open one of a capacity. ``logits_row_bytes``: what the host needs per row of
    logits; ``scored_rows``: rows of logits that a scoring job wants at once (0: one per sequence);
    ``device``: number of the accelerator that computes (of the host, where there is none); ``stage``: what one rank of
    several computes: the plan is of that rank."""
    if stage is not None and stage.ranks == 1:
        stage = None
    shape, dtype, packed = model.shape, model.dtype, model.packed_for(policy)
    compute = hardware.compute_tier
    decoder = model.decoder
    for name, placement in policy.placements.items():
        if placement.gpu > 0 and compute is not Tier.GPU:
            raise UserError(
                f"policy.{name}.gpu",
                placement.gpu,
                "0 on a machine without accelerator",
                "Move the share to cpu or disk, or choose gpu=emulated.",
            )
    slices = 1 if model.part is None else model.part.ranks
    windows = () if scored_rows else ring_windows(decoder)
    groups = form_groups(shape, dtype, policy, requests, compute, windows, 1 if stage is None else stage.ranks)
    tiers = unit_tiers(packed, policy, stage)
    units = tuple(
        planned_unit(
            *(decoder, unit, tier, policy, Site(compute, device), groups.rings), not is_own(unit, packed, stage), slices
        )
        for unit, tier in zip(packed.units, tiers, strict=True)
    )
    overlapped = compute is Tier.GPU and policy.attention is AttentionSite.CPU
    job = ScheduledJob(
        units=units,
        compute_tier=compute,
        attention=policy.attention,
        weight_buffers=policy.prefetch,
        num_buffers=max(2, policy.prefetch),
        hidden_row_bytes=shape.hidden_size * dtype.bytes,
        embed_row_bytes=sum(t.tensor.spec.shape[1] for t in packed.tables) * dtype.bytes,
        qkv_row_bytes=(shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim * dtype.bytes,
        attention_row_bytes=shape.num_heads * shape.head_dim * dtype.bytes,
        logits_row_bytes=logits_row_bytes,
        attention_flops_per_pair=4 * shape.num_heads * shape.head_dim,
        keep_kv=groups.lifetime > 1 and not scored_rows,
        dequantized_buffers=(2 if overlapped else 1) if any(u.unpack for u in units) else 0,
        dequantized_buffer_bytes=max(
            u.plain_bytes for u in packed.units if u.kind is not UnitKind.EXPERTS and is_own(u, packed, stage)
        ),
        device=device,
        routed_row_bytes=max((routed_row_bytes(layer, dtype) for layer in decoder.kinds), default=0),
        stage=stage,
        slices=slices,
    )
    kv_slots = all_slot_bytes(job, policy, groups)
    tokens = sum(kv_slot.size for kv_slot in groups.kv_slots) * TOKEN_BYTES if job.tokens_stay else 0
    moving = staging(job, policy, groups)
    home, of_experts = dict.fromkeys(Tier, 0), dict.fromkeys(Tier, 0)
    for unit, tier in zip(packed.units, tiers, strict=True):
        (of_experts if unit.kind is UnitKind.EXPERTS else home)[tier] += home_bytes(unit, packed, stage)
    kv, hidden = _homes(job, groups, kv_slots)
    parts: dict[Site, dict[str, int]] = {
        job.site_of(tier): {
            "weights": home[tier],
            "experts": of_experts[tier],
            "kv_cache": kv[tier],
            "activations": hidden[tier],
        }
        for tier in hardware.tiers
    }
    parts[job.site]["tokens"] = tokens
    _add_buffers(parts, job)
    _add_staging(parts, job, moving, kv_slots)
    for unit in (u for u in packed.units if is_own(u, packed, stage)):
        for site in job.attends_at(units[unit.index]):
            parts[site]["attention sinks"] = parts[site].get("attention sinks", 0) + unit.sink_bytes
    workspace = _workspace(job, policy, groups, moving, decoder, dtype, scored_rows)
    parts[job.site]["workspace"] = workspace + _unpacked_experts(job, packed, policy, dtype.bytes)
    if isinstance(requests, Capacity):
        layers = sum(unit.kind is UnitKind.LAYER for unit in job.own)
        parts[job.site]["kept prefixes"] = requests.kept_tokens * groups.token_bytes * layers
    if moving.cpu_attention_buffers:
        attending = _attention_bytes(job, policy, _largest(groups), decoder, dtype.bytes)
        parts[job.site.host]["attention workspace"] = attending
    parts[job.site.host]["expert workspace"] = _away_bytes(job, policy, groups, moving, decoder, dtype.bytes)
    return MemoryPlan(
        model=model,
        policy=policy,
        hardware=hardware,
        job=job,
        groups=groups,
        kv_slots=kv_slots,
        staging=moving,
        bytes={site: {k: v for k, v in p.items() if v} for site, p in parts.items()},
        realised_weights=realised(home),
        realised_kv_cache=realised(kv),
        realised_activations=realised(hidden),
        realised_experts=None if policy.experts is None else realised(of_experts),
    )


def _homes(
    job: ScheduledJob, groups: SequenceGroups, kv_slots: tuple[KVSlotBytes, ...]
) -> tuple[dict[Tier, int], dict[Tier, int]]:
    """Bytes of KV cache and of hidden states at home, per tier."""
    kv, hidden = dict.fromkeys(Tier, 0), dict.fromkeys(Tier, 0)
    for kv_slot, sizes in zip(groups.kv_slots, kv_slots, strict=True):
        for ring, layers in job.rings.items():
            in_place = sum(not u.site.is_accelerator for u in layers)
            for span, size in zip(kv_slot.kv, sizes.kv[ring], strict=True):
                if span.tier is Tier.GPU:  # layers computed on the cpu keep their cache there
                    kv[Tier.GPU] += size * (len(layers) - in_place)
                    kv[Tier.CPU] += size * in_place
                else:
                    kv[span.tier] += size * len(layers)
        for span, size in zip(kv_slot.hidden, sizes.hidden, strict=True):
            hidden[span.tier] += size
    return kv, hidden


def _add_buffers(parts: dict[Site, dict[str, int]], job: ScheduledJob) -> None:
    """Staging buffers of weights, and unpacked weights."""
    for site, buffers in job.buffers.items():
        parts[site]["weight slots"] = sum(buffer.bytes for buffer in buffers)
    parts[job.site]["unpacked weights"] = job.dequantized_buffers * job.dequantized_buffer_bytes


def _add_staging(
    parts: dict[Site, dict[str, int]], job: ScheduledJob, moving: Staging, kv_slots: tuple[KVSlotBytes, ...]
) -> None:
    host = job.site.host
    for site, size in moving.prompt.items():
        parts[site]["kv prompts"] = moving.num_buffers * size
    parts[host]["kv prompts from accelerator"] = moving.num_buffers * moving.prompt_host
    parts[job.site]["kv slots"] = moving.num_buffers * moving.kv_buffer
    parts[host]["kv host slots"] = moving.num_buffers * moving.kv_host
    parts[host]["kv tails"] = sum(
        len(layers) * sum(kv_slot.tails[ring]) for kv_slot in kv_slots for ring, layers in job.rings.items()
    )
    buffers = moving.num_buffers + moving.cpu_attention_buffers
    parts[host]["activation pages"] = buffers * moving.pages
    parts[host]["inbox"] = buffers * moving.inbox
    parts[host]["outbox"] = moving.outbox
    parts[host]["sums"] = buffers * moving.sums


def _workspace(
    job: ScheduledJob,
    policy: Policy,
    groups: SequenceGroups,
    moving: Staging,
    decoder: Decoder,
    dtype: DType,
    scored_rows: int,
) -> int:
    """Temporaries of the largest compute step, from the shapes the kernels create: what a layer's parts hold at once
    (``Layer.temporaries``); attention has its own (``_attention_bytes``) at another time; logits are kept in float32
    next to their original, once more while they are capped.
    """
    width = dtype.bytes
    largest = _largest(groups)
    tokens, decode = _rows_at_once(policy, groups)
    per_token = max(layer.temporaries for layer in decoder.kinds)
    # q, k, v of every stage stay until their stage is used again.
    # Where ranks share layers, so do its part of a sum and the sum.
    kept = 2 if job.slices == 1 else 4
    staged = max(2 * layer.attention.qkv for layer in decoder.kinds) + kept * decoder.hidden
    rows = max(scored_rows, decode, *(c.size for c in largest))
    logits = rows * decoder.vocab * (width + 4)
    if decoder.head.soft_cap is not None:
        logits += rows * decoder.vocab * width
    attending = _attention_bytes(job, policy, largest, decoder, width)
    return (
        max(tokens * per_token * width, attending)
        + tokens * job.num_buffers * staged * width
        + moving.cpu_attention_buffers * decode * staged * width
        + logits
        + min(KERNEL_BYTES, 4 * max(u.load_bytes for u in job.own))
    )


def _rows_at_once(policy: Policy, groups: SequenceGroups) -> tuple[int, int]:
    """The most rows of a micro-batch, and of one that decodes."""
    prefill = max(max(chunk_rows(c, everything(c), chunk_len(policy, c.size))) for c in _largest(groups))
    decode = min(policy.gpu_batch_size, sum(kv_slot.size for kv_slot in groups.kv_slots))
    return max(prefill, decode), decode


def _unpacked_experts(job: ScheduledJob, packed: PackedModel, policy: Policy, width: int) -> int:
    """What products with an accelerator's compressed experts unpack at a time: a tile, or all of a small matrix."""

    def are_codes(unit: Unit) -> bool:
        apart = unit.kind is UnitKind.EXPERTS and policy.lossy.weights is not None
        return apart or packed.units[unit.index].packing is not None

    experts = (u for u in job.own if u.experts and u.site.is_accelerator and are_codes(u))
    return max((min(TILE_BYTES, u.expert_values * width) for u in experts), default=0)


def _away_bytes(
    job: ScheduledJob, policy: Policy, groups: SequenceGroups, moving: Staging, decoder: Decoder, width: int
) -> int:
    """Of experts that the cpu computes for an accelerator: the temporaries of one micro-batch, and what every stage
    has been sent and has made."""
    if not any(are_away(unit, job.experts_of(unit)) for unit in job.sweep):
        return 0
    tokens, decode = _rows_at_once(policy, groups)
    staged = tokens * job.num_buffers + moving.cpu_attention_buffers * decode
    per_token = max(layer.temporaries for layer in decoder.kinds) * width
    return tokens * per_token + staged * (job.routed_row_bytes + job.hidden_row_bytes)


def _attention_bytes(
    job: ScheduledJob, policy: Policy, largest: Sequence[SequenceGroup], decoder: Decoder, width: int
) -> int:
    """Temporaries of one sequence group's attention: scores of a decode step in float32 and the dtype, twice; the mask
    of a prompt's last chunk, or of what follows on what prompts share or have kept; scores of a prompt that are changed
    before the softmax, or have sinks, some at a time; keys and values of a compressed cache, unpacked; those of a ring
    that a chunk attends to, in one piece with its own."""
    most = 0
    kinds = [layer.attention for layer in decoder.kinds]
    heads = max(attention.heads for attention in kinds)
    kv_values = 2 * max(attention.rows["k"] for attention in kinds)
    changed = any(not attention.mod.is_none or attention.sinks for attention in kinds)
    joined = 4 * any(attention.sinks for attention in kinds)  # scores beside their sink, in float32
    for group in largest:
        prompt, chunk = max(group.prompt_lens), chunk_len(policy, group.size)
        rows = prompt if chunk is None else min(chunk, prompt)
        mask = rows * prompt if chunk is not None or group.shared or group.kept else 0
        tokens, unpacked, scores = group.size * max(cached_tokens(one, group) for one in kinds), 0, 0
        if job.keep_kv:
            scores = tokens * heads * ((16 if changed else 8) + 2 * width + joined)
        if policy.lossy.kv_cache is not None:
            unpacked = max(tokens, group.size * prompt) * kv_values * width
        if mask:
            gathered = group.size * max(gathered_tokens(one, group, rows) for one in kinds)
            mask += gathered * kv_values * width * (1 if policy.lossy.kv_cache is None else 2)
        if changed:
            mask += min(SCORES_AT_ONCE, sum(group.prompt_lens) * prompt * heads) * (12 + width + joined)
        most = max(most, mask + scores + unpacked)
    return most


def _largest(groups: SequenceGroups) -> list[SequenceGroup]:
    """Sequence groups that may be the largest in some respect: by prompt tokens, by all tokens, by sequences."""
    requests, starts = groups.requests, groups.members
    measures = (
        lambda g: sum(requests[i].prompt_len for i in g),
        lambda g: sum(requests[i].prompt_len + requests[i].gen_len for i in g),
        len,
    )
    indices = [max(range(len(starts)), key=lambda n: measure(starts[n])) for measure in measures]
    return [groups.start(i, groups.kv_slots[i % len(groups.kv_slots)]) for i in indices]
