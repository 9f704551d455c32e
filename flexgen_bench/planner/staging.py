"""Bytes of what moves through staging buffers, and of the KV slots at home: the engine allocates exactly these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexgen_bench.core.policy import Policy
from flexgen_bench.core.tiers import Site, Tier
from flexgen_bench.core.units import PAGE, aligned
from flexgen_bench.schedule.passes import chunk_len
from flexgen_bench.schedule.scheduled_job import ScheduledJob, UnitKind
from flexgen_bench.schedule.sequence_group import KVSlot, SequenceGroup, Span
from flexgen_bench.schedule.sequence_groups import SequenceGroups


@dataclass(frozen=True)
class KVSlotBytes:
    """Of one KV slot, per span: KV region and unfinished tail segment (on disk only) of one layer, by the layer's ring,
    and hidden states."""

    kv: Mapping[int | None, tuple[int, ...]]
    tails: Mapping[int | None, tuple[int, ...]]
    hidden: tuple[int, ...]

    def moved(self, kv_slot: KVSlot, job: ScheduledJob) -> int:
        """Of the cache in host memory, what goes to the accelerator in every decode pass. kv_slot: the one it is of."""
        return sum(
            size * sum(unit.site.is_accelerator for unit in layers)
            for ring, layers in job.rings.items()
            for span, size in zip(kv_slot.kv, self.kv[ring], strict=True)
            if span.tier is Tier.CPU and span.is_moved
        )


@dataclass(frozen=True)
class Staging:
    """Bytes of one staging buffer each, and how many there are.

    prompt: keys and values of a prompt on their way home, per site that computes layers; prompt_host: the same between
    an accelerator and disk. kv_buffer, kv_host: a cache being moved to the accelerator, or read from disk. pages:
    hidden states between disk and memory. inbox: those of a micro-batch from the rank before; outbox: all that may be
    on their way to the next rank at once. sums: of the ranks that share a layer, what they add up of a micro-batch.
    num_buffers: for prefill and ordinary decode; cpu_attention_buffers: further
    ones for micro-batches the cpu attends for.
    """

    num_buffers: int
    cpu_attention_buffers: int
    prompt: Mapping[Site, int]
    prompt_host: int
    kv_buffer: int
    kv_host: int
    pages: int
    inbox: int = 0
    outbox: int = 0
    sums: int = 0


def chunk_rows(group: SequenceGroup, span: Span, chunk: int | None) -> list[int]:
    """Prompt rows of a span in each chunk."""
    lens = group.prompt_lens[span.start : span.stop]
    if chunk is None:
        return [sum(lens)]
    longest = max(group.prompt_lens)
    starts = range(0, longest, chunk)
    if lens and min(lens) == longest:  # all alike, which is usual: large jobs are planned often
        return [len(lens) * min(chunk, longest - start) for start in starts]
    return [sum(min(chunk, max(0, n - start)) for n in lens) for start in starts]


def everything(group: SequenceGroup) -> Span:
    return Span(Tier.GPU, 0, group.size)


def all_slot_bytes(job: ScheduledJob, policy: Policy, groups: SequenceGroups) -> tuple[KVSlotBytes, ...]:
    """Of every KV slot."""
    kinds = {kv_slot.index: kv_slot for kv_slot in groups.alike}
    sizes = {index: slot_bytes(job, policy, groups, kv_slot) for index, kv_slot in kinds.items()}
    return tuple(sizes[kv_slot.index] for kv_slot in groups.alike)


def slot_bytes(job: ScheduledJob, policy: Policy, groups: SequenceGroups, kv_slot: KVSlot) -> KVSlotBytes:
    """The most that any sequence group needs in this KV slot."""
    hidden = [0] * len(kv_slot.hidden)
    kv, tails = ({ring: [0] * len(kv_slot.kv) for ring in job.rings} for _ in range(2))
    for group in groups.possible(kv_slot):
        for ring, sizes in kv.items():
            for place, (span, layout) in enumerate(zip(group.kv, group.laid_out(ring), strict=True)):
                if span.count and job.keep_kv:
                    sizes[place] = max(sizes[place], layout.region_bytes)
                    if span.tier is Tier.DISK:
                        tails[ring][place] = max(tails[ring][place], layout.tail_bytes)
        chunk = chunk_len(policy, group.size)
        for place, span in enumerate(group.hidden):
            rows = [n * job.hidden_row_bytes for n in chunk_rows(group, span, chunk)]
            if span.tier is Tier.DISK:
                rows = [aligned(size) for size in rows]
            hidden[place] = max(hidden[place], sum(rows))
    regions, unfinished = ({ring: tuple(sizes) for ring, sizes in of.items()} for of in (kv, tails))
    return KVSlotBytes(regions, unfinished, tuple(hidden))


def staging(job: ScheduledJob, policy: Policy, groups: SequenceGroups) -> Staging:
    """The largest of everything that is staged, over all sequence groups of the job."""
    sites = {u.site for u in job.own if u.kind is UnitKind.LAYER}
    on_accelerator = any(site.is_accelerator for site in sites)
    prompt = dict.fromkeys(sites, 0)
    prompt_host = kv_buffer = kv_host = pages = 0
    any_disk = any(s.tier is Tier.DISK for kv_slot in groups.kv_slots for s in kv_slot.hidden)
    for kv_slot in {kv_slot.index: kv_slot for kv_slot in groups.alike}.values():
        for group in groups.possible(kv_slot):
            chunk = chunk_len(policy, group.size)
            chunked = len(chunk_rows(group, everything(group), chunk)) > 1
            for ring, layers in job.rings.items():
                pairs = [(s, x) for s, x in zip(group.kv, group.laid_out(ring), strict=True) if s.count]
                for site in {unit.site for unit in layers}:
                    staged = sum(
                        layout.prompt_bytes
                        for span, layout in pairs
                        if (
                            job.keep_kv
                            and span.tier is not site.tier
                            and not (site.tier is Tier.CPU and span.tier is Tier.GPU)
                        )
                        or (not job.keep_kv and chunked)
                    )
                    prompt[site] = max(prompt[site], staged)
                if job.keep_kv:
                    disk = [layout for span, layout in pairs if span.tier is Tier.DISK]
                    if on_accelerator:
                        prompt_host = max(prompt_host, sum(x.prompt_bytes for x in disk))
                    kv_host = max([kv_host, *(x.region_bytes for x in disk)])
                    away = [x for span, x in pairs if span.is_moved]
                    if any(unit.site.is_accelerator for unit in layers):
                        kv_buffer = max([kv_buffer, *(x.moved_region_bytes for x in away)])
            if any_disk:
                rows = max(chunk_rows(group, everything(group), chunk))
                pages = max(pages, aligned(rows * job.hidden_row_bytes) + len(group.hidden) * PAGE)
    size = max(len(group) for group in groups.members)
    if any_disk:  # in decode, every sequence may be a part of its own
        pages = max(pages, max(policy.gpu_batch_size, size) * aligned(job.hidden_row_bytes))
    split = on_accelerator and any(s.is_delegated for kv_slot in groups.kv_slots for s in kv_slot.kv)
    together = max(1, policy.gpu_batch_size // size)
    cpu_attention_buffers = -(-len(groups.kv_slots) // together) if split and job.keep_kv else 0
    inbox, outbox, sums = _between_ranks(job, policy, groups)
    return Staging(
        job.num_buffers, cpu_attention_buffers, prompt, prompt_host, kv_buffer, kv_host, pages, inbox, outbox, sums
    )


def _between_ranks(job: ScheduledJob, policy: Policy, groups: SequenceGroups) -> tuple[int, int, int]:
    """Bytes of the largest micro-batch that comes from the rank before, of the largest pass that goes to the next one
    (the next rank may want its micro-batches in another order, so all of a pass must have room on the way), and of the
    largest micro-batch that ranks add up."""
    largest = {kv_slot.index: 0 for kv_slot in groups.kv_slots}
    in_pass = dict(largest)
    kinds = {kv_slot.index: kv_slot for kv_slot in groups.alike}
    for index, kv_slot in kinds.items():
        for group in groups.possible(kv_slot):
            rows = chunk_rows(group, everything(group), chunk_len(policy, group.size))
            largest[index] = max(largest[index], *rows)
            in_pass[index] = max(in_pass[index], sum(rows))
    together = max(min(policy.gpu_batch_size, sum(kv_slot.size for kv_slot in groups.kv_slots)), *largest.values())
    of_waves = [
        sum(in_pass[groups.alike[slot].index] for slot in groups.slots_of(wave)) for wave in range(groups.waves)
    ]
    row = job.hidden_row_bytes
    inbox, outbox = job.entry is not None, job.exit is not None
    return inbox * together * row, outbox * max(of_waves) * row, (job.slices > 1) * together * row
