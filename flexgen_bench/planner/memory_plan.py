"""Every byte a job needs, per tier, before anything is allocated. The engine allocates from this plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexgen_bench.core.errors import DoesNotFit, UserError
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.models.packing import PackedModel, PackedUnit
from flexgen_bench.planner.staging import KVSlotBytes, Staging, all_slot_bytes, chunk_rows, everything, staging
from flexgen_bench.schedule.job import Job, Site, Unit, UnitKind
from flexgen_bench.schedule.passes import chunk_len
from flexgen_bench.schedule.placement import place_units, realised
from flexgen_bench.schedule.sequence_group import SequenceGroup
from flexgen_bench.schedule.sequence_groups import Capacity, Request, SequenceGroups, form_groups

# What products on compressed weights, and on a processor, take for tiles at a time; of a small model, the whole unit in
# float32.
KERNEL_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per tier and part, the job for the generator, its sequence groups and KV slots, and the shares that came
    out."""

    job: Job
    groups: SequenceGroups
    kv_slots: tuple[KVSlotBytes, ...]
    staging: Staging
    bytes: Mapping[Tier, Mapping[str, int]]
    realised_weights: Mapping[str, float]
    realised_kv_cache: Mapping[str, float]
    realised_activations: Mapping[str, float]

    def total(self, tier: Tier) -> int:
        return sum(self.bytes.get(tier, {}).values())

    def check(self, hardware: HardwareProfile, available: Mapping[Tier, int]) -> None:
        """Raise DoesNotFit if a tier is too small: the profile's capacity, or what is ``available`` to a plan now."""
        for tier, parts in self.bytes.items():
            need = sum(parts.values())
            # Weights on disk are in the packed store already: they do not take from what is free.
            stored = parts.get("weights", 0) if tier is Tier.DISK else 0
            free = available.get(tier)
            limits = (hardware.capacity_bytes(tier), None if free is None else free + stored)
            capacity = min((limit for limit in limits if limit is not None), default=None)
            if capacity is not None and need > capacity:
                largest = sorted(parts.items(), key=lambda item: -item[1])
                named = ", ".join(f"{name} {count / 2**30:.2f} GiB" for name, count in largest if count)
                raise DoesNotFit(tier, need, capacity, named, _REMEDY[tier])


_REMEDY = {
    Tier.GPU: "Lower policy.gpu_batch_size or policy.prefill_chunk, or move shares of weights, kv_cache or activations to cpu.",
    Tier.CPU: "Lower the block size, move shares of weights or kv_cache to disk, or raise gpu.cpu_memory.",
    Tier.DISK: "Free space in the offload directory, choose another with offload_dir, or keep more in memory.",
}


def weight_tiers(packed: PackedModel, placement: Placement) -> list[Tier]:
    """Where each unit lives. A tied head lives with the embedding, whose token table it reads."""
    units = packed.units
    sizes = [units[0].home_bytes + (units[-1].home_bytes if packed.tied else 0)]
    sizes += [u.home_bytes for u in units[1:-1]]
    if not packed.tied:
        sizes.append(units[-1].home_bytes)
    tiers = place_units(sizes, placement)
    return [*tiers, tiers[0]] if packed.tied else tiers


def plan_job(
    shape: ModelShape,
    packed: PackedModel,
    dtype: DType,
    policy: Policy,
    hardware: HardwareProfile,
    requests: Sequence[Request] | Capacity,
    logits_row_bytes: int = 8,
    scored_rows: int = 0,
) -> MemoryPlan:
    """Plan a job of these requests, or an open one of a capacity. ``logits_row_bytes``: what the host needs per row of
    logits; ``scored_rows``: rows of logits that a scoring job wants at once (0: one per sequence)."""
    compute = hardware.compute_tier
    for name in ("weights", "kv_cache", "activations"):
        placement: Placement = getattr(policy, name)
        if placement.gpu > 0 and compute is not Tier.GPU:
            raise UserError(
                f"policy.{name}.gpu",
                placement.gpu,
                "0 on a machine without accelerator",
                "Move the share to cpu or disk, or choose gpu=emulated.",
            )
    tiers = weight_tiers(packed, policy.weights)
    units = tuple(_unit(shape, unit, tier, policy, compute) for unit, tier in zip(packed.units, tiers, strict=True))
    overlapped = compute is Tier.GPU and policy.attention is AttentionSite.CPU
    groups = form_groups(shape, dtype, policy, requests, compute)
    job = Job(
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
        dequantized_buffer_bytes=max(u.plain_bytes for u in packed.units),
    )
    kv_slots = all_slot_bytes(job, policy, groups)
    moving = staging(job, policy, groups)
    home = dict.fromkeys(Tier, 0)
    for unit, tier in zip(packed.units, tiers, strict=True):
        home[tier] += unit.home_bytes
    kv, hidden = _homes(job, groups, kv_slots)
    parts: dict[Tier, dict[str, int]] = {
        tier: {"weights": home[tier], "kv_cache": kv[tier], "activations": hidden[tier]} for tier in hardware.tiers
    }
    _add_buffers(parts, job)
    _add_staging(parts, job, moving, kv_slots)
    parts[compute]["workspace"] = _workspace(job, policy, groups, moving, shape, dtype, scored_rows)
    if moving.apart:
        attending = _attention_bytes(job, policy, _largest(groups), shape, dtype.bytes)
        parts[Tier.CPU]["attention workspace"] = attending
    return MemoryPlan(
        job=job,
        groups=groups,
        kv_slots=kv_slots,
        staging=moving,
        bytes={tier: {k: v for k, v in p.items() if v} for tier, p in parts.items()},
        realised_weights=realised(home),
        realised_kv_cache=realised(kv),
        realised_activations=realised(hidden),
    )


def _unit(shape: ModelShape, unit: PackedUnit, tier: Tier, policy: Policy, compute: Tier) -> Unit:
    # The head, too; of the embedding only rows are moved anyway.
    stays = unit.kind is not UnitKind.EMBED and policy.offloaded is Offloaded.IN_PLACE
    site = Site(Tier.CPU if stays and tier is not Tier.GPU else compute)
    return Unit(
        index=unit.index,
        kind=unit.kind,
        tier=tier,
        load_bytes=unit.num_bytes,
        site=site,
        flops_before=_flops_before(shape, unit.kind, unit.num_values),
        flops_after=_flops_after(shape, unit.kind, unit.num_values),
        # A processor unpacks tile by tile inside a product; an accelerator once for all micro-batches.
        unpack=policy.lossy.weights is not None and site.is_accelerator and unit.plain_bytes > 0,
    )


def _homes(
    job: Job, groups: SequenceGroups, kv_slots: tuple[KVSlotBytes, ...]
) -> tuple[dict[Tier, int], dict[Tier, int]]:
    """Bytes of KV cache and of hidden states at home, per tier."""
    kv, hidden = dict.fromkeys(Tier, 0), dict.fromkeys(Tier, 0)
    layers = [u for u in job.units if u.kind is UnitKind.LAYER]
    in_place = sum(not u.site.is_accelerator for u in layers)
    for kv_slot, sizes in zip(groups.kv_slots, kv_slots, strict=True):
        for span, size in zip(kv_slot.kv, sizes.kv, strict=True):
            if span.tier is Tier.GPU:  # layers computed on the cpu keep their cache there
                kv[Tier.GPU] += size * (len(layers) - in_place)
                kv[Tier.CPU] += size * in_place
            else:
                kv[span.tier] += size * len(layers)
        for span, size in zip(kv_slot.hidden, sizes.hidden, strict=True):
            hidden[span.tier] += size
    return kv, hidden


def _add_buffers(parts: dict[Tier, dict[str, int]], job: Job) -> None:
    """Staging buffers of weights, and unpacked weights."""
    for tier, slots in job.buffers.items():
        parts[tier]["weight slots"] = sum(slot.bytes for slot in slots)
    parts[job.compute_tier]["unpacked weights"] = job.dequantized_buffers * job.dequantized_buffer_bytes


def _add_staging(
    parts: dict[Tier, dict[str, int]], job: Job, moving: Staging, kv_slots: tuple[KVSlotBytes, ...]
) -> None:
    layers = sum(u.kind is UnitKind.LAYER for u in job.units)
    for tier, size in moving.prompt.items():
        parts[tier]["kv prompts"] = moving.num_buffers * size
    parts[Tier.CPU]["kv prompts from accelerator"] = moving.num_buffers * moving.prompt_host
    parts[job.compute_tier]["kv slots"] = moving.num_buffers * moving.kv_buffer
    parts[Tier.CPU]["kv host slots"] = moving.num_buffers * moving.kv_host
    parts[Tier.CPU]["kv tails"] = layers * sum(sum(kv_slot.tails) for kv_slot in kv_slots)
    parts[Tier.CPU]["activation pages"] = (moving.num_buffers + moving.apart) * moving.pages


def _workspace(
    job: Job, policy: Policy, groups: SequenceGroups, moving: Staging, shape: ModelShape, dtype: DType, scored_rows: int
) -> int:
    """Temporaries of the largest compute step, from the shapes the kernels create.

    A projection holds x, its norm, and q, k, v twice (fused and split); an MLP holds x, its norm and up to three
    tensors of the inner width; attention has its own (``_attention_bytes``) at another time; logits are kept in float32
    next to their original.
    """
    width = dtype.bytes
    largest = _largest(groups)
    prefill = max(max(chunk_rows(c, everything(c), chunk_len(policy, c.size))) for c in largest)
    decode = min(policy.gpu_batch_size, sum(kv_slot.size for kv_slot in groups.kv_slots))
    tokens = max(prefill, decode)
    attention = 2 * (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    per_token = max(2 * shape.hidden_size + attention, 3 * shape.hidden_size + 3 * shape.ffn_size)
    # q, k, v of every stage stay until their stage is used again.
    staged = (shape.num_heads * 2 + 4 * shape.num_kv_heads) * shape.head_dim + 2 * shape.hidden_size
    rows = max(scored_rows, decode, *(c.size for c in largest))
    logits = rows * shape.vocab_size * (width + 4)
    attending = _attention_bytes(job, policy, largest, shape, width)
    return (
        max(tokens * per_token * width, attending)
        + tokens * job.num_buffers * staged * width
        + moving.apart * decode * staged * width
        + logits
        + min(KERNEL_BYTES, 4 * max(u.load_bytes for u in job.units))
    )


def _attention_bytes(job: Job, policy: Policy, largest: Sequence[SequenceGroup], shape: ModelShape, width: int) -> int:
    """Temporaries of one sequence group's attention: scores of a decode step in float32 and the dtype, twice; the mask
    of a prompt's last chunk, or of what follows on what prompts share or have kept; keys and values of a compressed cache,
    unpacked."""
    found = 0
    for group in largest:
        prompt, chunk = max(group.prompt_lens), chunk_len(policy, group.size)
        rows = prompt if chunk is None else min(chunk, prompt)
        mask = rows * prompt if chunk is not None or group.shared or group.kept else 0
        tokens, unpacked, scores = group.size * (prompt + group.gen_len), 0, 0
        if job.keep_kv:
            scores = tokens * shape.num_heads * (8 + 2 * width)
        if policy.lossy.kv_cache is not None:
            unpacked = tokens * shape.kv_values_per_token_layer * width
        found = max(found, mask + scores + unpacked)
    return found


def _largest(groups: SequenceGroups) -> list[SequenceGroup]:
    """Sequence groups that may be the largest in some respect: by prompt tokens, by all tokens, by sequences."""
    asked, starts = groups.requests, groups.members
    measures = (
        lambda g: sum(asked[i].prompt_len for i in g),
        lambda g: sum(asked[i].prompt_len + asked[i].gen_len for i in g),
        len,
    )
    indices = [max(range(len(starts)), key=lambda n: measure(starts[n])) for measure in measures]
    return [groups.start(i, groups.kv_slots[i % len(groups.kv_slots)]) for i in indices]


def _flops_before(shape: ModelShape, kind: UnitKind, num_values: int) -> int:
    if kind is not UnitKind.LAYER:
        return 2 * num_values
    return 2 * shape.hidden_size * (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim


def _flops_after(shape: ModelShape, kind: UnitKind, num_values: int) -> int:
    if kind is not UnitKind.LAYER:
        return 0
    return 2 * num_values - _flops_before(shape, kind, num_values)
