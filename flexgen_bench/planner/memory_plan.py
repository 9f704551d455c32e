"""Every byte a job needs, per tier, before anything is allocated. The engine allocates from this plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexgen_bench.core.errors import DoesNotFit, UserError
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.placement import ShareSpreader, place_sequences, place_units, realised
from flexgen_bench.planner.units import PackedModel
from flexgen_bench.schedule.job import Job, KVLayout, MicroBatch, Span, Unit, UnitKind

# A tail segment of a KV cache on disk is written at once; below this size direct writes lose most of a disk's
# bandwidth (measured: docs/notes/disk.md).
DISK_SEGMENT_BYTES = 128 * 1024
MAX_DISK_SEGMENTS = (
    8  # more tail segments than this cost more in small matrix products than they save
)


@dataclass(frozen=True)
class Request:
    """One sequence to compute: prompt tokens and the most new tokens it may get."""

    prompt_len: int
    gen_len: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per tier and part, the job for the generator, and the shares that came out."""

    job: Job
    bytes: Mapping[Tier, Mapping[str, int]]
    realised_weights: Mapping[str, float]
    realised_kv_cache: Mapping[str, float]
    realised_activations: Mapping[str, float]

    def total(self, tier: Tier) -> int:
        return sum(self.bytes.get(tier, {}).values())

    def check(self, hardware: HardwareProfile, available: Mapping[Tier, int]) -> None:
        """Raise DoesNotFit if a tier is too small: the profile's capacity, or what is ``available`` to a plan now."""
        stated = {
            Tier.GPU: hardware.gpu_memory_bytes,
            Tier.CPU: hardware.cpu_memory_bytes,
            Tier.DISK: hardware.disk_bytes,
        }
        for tier, parts in self.bytes.items():
            need = sum(parts.values())
            # Weights on disk are in the packed store already: they do not take from what is free.
            stored = parts.get("weights", 0) if tier is Tier.DISK else 0
            free = available.get(tier)
            limits = (stated[tier], None if free is None else free + stored)
            capacity = min((limit for limit in limits if limit is not None), default=None)
            if capacity is not None and need > capacity:
                largest = sorted(parts.items(), key=lambda item: -item[1])
                named = ", ".join(
                    f"{name} {count / 2**30:.2f} GiB" for name, count in largest if count
                )
                raise DoesNotFit(tier, need, capacity, named, _REMEDY[tier])


_REMEDY = {
    Tier.GPU: "Lower policy.gpu_batch_size, or move shares of weights, kv_cache or activations to cpu.",
    Tier.CPU: "Lower the block size, move shares of weights or kv_cache to disk, or raise gpu.cpu_memory.",
    Tier.DISK: "Free space in the offload directory, choose another with offload_dir, or keep more in memory.",
}


def form_batches(
    requests: Sequence[Request], order: Sequence[int], policy: Policy
) -> tuple[MicroBatch, ...]:
    """Cut a block's sequences (``order`` lists their numbers) into micro-batches, spread over the tiers."""
    kv, hidden = ShareSpreader(policy.kv_cache), ShareSpreader(policy.activations)
    batches = []
    for index, start in enumerate(range(0, len(order), policy.gpu_batch_size)):
        members = tuple(order[start : start + policy.gpu_batch_size])
        batches.append(
            MicroBatch(
                index=index,
                sequences=members,
                prompt_lens=tuple(requests[i].prompt_len for i in members),
                gen_len=max(requests[i].gen_len for i in members),
                kv=place_sequences(len(members), kv),
                hidden=place_sequences(len(members), hidden),
            )
        )
    return tuple(batches)


def weight_tiers(packed: PackedModel, placement: Placement) -> list[Tier]:
    """Where each unit lives. A tied head lives with the embedding, whose token table it reads."""
    units = packed.units
    sizes = [units[0].home_bytes + (units[-1].home_bytes if packed.tied else 0)]
    sizes += [u.home_bytes for u in units[1:-1]]
    if not packed.tied:
        sizes.append(units[-1].home_bytes)
    tiers = place_units(sizes, placement)
    return [*tiers, tiers[0]] if packed.tied else tiers


def kv_layout(
    shape: ModelShape, dtype: DType, batch: MicroBatch, span: Span, compute: Tier
) -> KVLayout:
    """Segments of one span's cache. Where attention happens in place, generated tokens are one segment."""
    token_bytes = shape.kv_values_per_token_layer * dtype.bytes
    new = max(batch.gen_len - 1, 0)  # the last token is never fed back
    segment = max(new, 1)
    if span.tier is Tier.DISK:
        worthwhile = -(-DISK_SEGMENT_BYTES // (span.count * token_bytes))
        segment = min(segment, max(worthwhile, -(-new // MAX_DISK_SEGMENTS), 1))
    elif span.tier is not compute:
        segment = min(segment, max(1, -(-new // MAX_DISK_SEGMENTS)))
    return KVLayout(span.count, batch.padded_len, new, segment, token_bytes)


def plan_block(
    shape: ModelShape,
    packed: PackedModel,
    dtype: DType,
    policy: Policy,
    hardware: HardwareProfile,
    batches: tuple[MicroBatch, ...],
    scored_rows: int = 0,
) -> MemoryPlan:
    """Plan one block. ``scored_rows``: rows of logits a scoring job wants at once (0: one per sequence)."""
    compute = hardware.compute_tier
    for name in ("weights", "kv_cache", "activations"):
        placement: Placement = getattr(policy, name)
        if placement.gpu > 0 and compute is not Tier.GPU:
            raise UserError(
                f"policy.{name}.gpu", placement.gpu, "0 on a machine without accelerator",
                "Move the share to cpu or disk, or choose gpu=emulated.",
            )  # fmt: skip
    keep_kv = any(batch.gen_len > 1 for batch in batches) and not scored_rows
    layouts = tuple(
        tuple(kv_layout(shape, dtype, batch, span, compute) for span in batch.kv)
        for batch in batches
    )
    tiers = weight_tiers(packed, policy.weights)
    units = tuple(
        Unit(
            index=u.index, kind=u.kind, tier=tier, load_bytes=u.num_bytes,
            flops_before=_flops_before(shape, u.kind, u.num_values),
            flops_after=_flops_after(shape, u.kind, u.num_values),
        )
        for u, tier in zip(packed.units, tiers, strict=True)
    )  # fmt: skip
    logits_row = shape.vocab_size * 4
    job = Job(
        units=units,
        batches=batches,
        compute_tier=compute,
        attention=policy.attention,
        weight_slots=policy.prefetch,
        host_slots=policy.prefetch,
        stages=max(2, policy.prefetch),
        hidden_row_bytes=shape.hidden_size * dtype.bytes,
        embed_row_bytes=sum(t.tensor.spec.shape[1] for t in packed.tables) * dtype.bytes,
        qkv_row_bytes=(shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim * dtype.bytes,
        attention_row_bytes=shape.num_heads * shape.head_dim * dtype.bytes,
        logits_row_bytes=logits_row,
        attention_flops_per_pair=4 * shape.num_heads * shape.head_dim,
        kv_layouts=layouts,
        keep_kv=keep_kv,
    )
    home: dict[Tier, int] = dict.fromkeys(Tier, 0)
    for u, tier in zip(packed.units, tiers, strict=True):
        home[tier] += u.home_bytes
    kv_home: dict[Tier, int] = dict.fromkeys(Tier, 0)
    hidden_home: dict[Tier, int] = dict.fromkeys(Tier, 0)
    for batch, row in zip(batches, layouts, strict=True):
        for span, layout in zip(batch.kv, row, strict=True):
            kv_home[span.tier] += layout.region_bytes * shape.num_layers
        for span in batch.hidden:
            hidden_home[span.tier] += batch.tokens(0, span) * job.hidden_row_bytes
    parts: dict[Tier, dict[str, int]] = {
        tier: {
            "weights": home[tier],
            "kv_cache": kv_home[tier] if keep_kv else 0,
            "activations": hidden_home[tier],
        }
        for tier in hardware.tiers
    }
    _add_staging(parts, job, hardware, shape)
    _add_workspace(parts, job, shape, dtype, scored_rows)
    return MemoryPlan(
        job=job,
        bytes={tier: {k: v for k, v in p.items() if v} for tier, p in parts.items()},
        realised_weights=realised(home),
        realised_kv_cache=realised(kv_home),
        realised_activations=realised(hidden_home),
    )


def _add_staging(
    parts: dict[Tier, dict[str, int]], job: Job, hardware: HardwareProfile, shape: ModelShape
) -> None:
    compute = job.compute_tier
    streamed = job.streamed
    if streamed:
        largest = max(u.load_bytes for u in streamed)
        parts[compute]["weight slots"] = job.weight_slots * largest
        from_disk = [u.load_bytes for u in streamed if u.tier is Tier.DISK]
        if from_disk and hardware.compute_tier is Tier.GPU:
            parts[Tier.CPU]["host weight slots"] = job.host_slots * max(from_disk)
    spilled = [s for batch in job.batches for s in batch.hidden if s.tier is Tier.DISK]
    if spilled:  # aligned pages between disk and memory
        rows = max(batch.tokens(0) for batch in job.batches)
        parts[Tier.CPU]["activation slots"] = job.stages * rows * job.hidden_row_bytes
    if not job.keep_kv:
        return
    slot, host, tails, prompts = 0, 0, 0, 0
    for batch, row in zip(job.batches, job.kv_layouts, strict=True):
        away = sum(
            layout.region_bytes
            for span, layout in zip(batch.kv, row, strict=True)
            if span.tier is not compute and job.has_accelerator and not job.attends_on_cpu(span)
        )
        on_disk = [
            layout for span, layout in zip(batch.kv, row, strict=True) if span.tier is Tier.DISK
        ]
        moved = sum(
            layout.prompt_bytes
            for span, layout in zip(batch.kv, row, strict=True)
            if span.tier is not compute
        )
        prompts = max(prompts, moved)
        slot, host = max(slot, away), max(host, sum(layout.region_bytes for layout in on_disk))
        tails += sum(layout.segment_bytes for layout in on_disk) * shape.num_layers
    parts[compute]["kv slots"] = job.stages * (slot + prompts)
    # Read staging and the staging of what is about to be written.
    parts[Tier.CPU]["kv host slots"] = 2 * job.stages * host
    parts[Tier.CPU]["kv tails"] = tails


def _add_workspace(
    parts: dict[Tier, dict[str, int]], job: Job, shape: ModelShape, dtype: DType, scored_rows: int
) -> None:
    """Temporaries of the largest compute step, from the shapes the kernels create.

    A projection holds x, its norm, and q, k, v twice (fused and split); an MLP holds x, its norm and up to three
    tensors of the inner width; logits are kept in float32 next to their original.
    """
    width = dtype.bytes
    tokens = max((batch.tokens(0) for batch in job.batches), default=0)
    attention = 2 * (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    per_token = max(2 * shape.hidden_size + attention, 3 * shape.hidden_size + 3 * shape.ffn_size)
    # q, k, v and the padded keys and values of every stage stay until their stage is used again.
    staged = (shape.num_heads * 2 + 4 * shape.num_kv_heads) * shape.head_dim + 2 * shape.hidden_size
    rows = max([scored_rows, *(batch.size for batch in job.batches)])
    logits = rows * shape.vocab_size * (width + 4)
    need = tokens * (per_token + job.stages * staged) * width + logits
    parts[job.compute_tier]["workspace"] = need


def _flops_before(shape: ModelShape, kind: UnitKind, num_values: int) -> int:
    if kind is not UnitKind.LAYER:
        return 2 * num_values
    return 2 * shape.hidden_size * (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim


def _flops_after(shape: ModelShape, kind: UnitKind, num_values: int) -> int:
    if kind is not UnitKind.LAYER:
        return 0
    return 2 * num_values - _flops_before(shape, kind, num_values)
