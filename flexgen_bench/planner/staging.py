"""Bytes of what moves through staging buffers, and of the rooms at home: the engine allocates exactly these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexgen_bench.core.policy import AttentionSite, Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import PAGE, aligned
from flexgen_bench.schedule.cohort import Cohort, Room, Span
from flexgen_bench.schedule.cohorts import Cohorts
from flexgen_bench.schedule.job import Job, UnitKind
from flexgen_bench.schedule.passes import chunk_len


@dataclass(frozen=True)
class RoomBytes:
    """Of one room, per span: KV region and unfinished tail segment (on disk only) of one layer, and hidden states."""

    kv: tuple[int, ...]
    tails: tuple[int, ...]
    hidden: tuple[int, ...]


@dataclass(frozen=True)
class Staging:
    """Bytes of one staging buffer each, and how many there are.

    prompt: keys and values of a prompt on their way home, per site that computes layers; prompt_host: the same between an
    accelerator and disk. kv_slot, kv_host: a cache being moved to the accelerator, or read from disk. pages: hidden states
    between disk and memory. stages: slots for prefill and ordinary decode; apart: further ones for micro-batches the cpu attends for.
    """

    stages: int
    apart: int
    prompt: Mapping[Tier, int]
    prompt_host: int
    kv_slot: int
    kv_host: int
    pages: int


def chunk_rows(cohort: Cohort, span: Span, chunk: int | None) -> list[int]:
    """Prompt rows of a span in each chunk."""
    lens = cohort.prompt_lens[span.start : span.stop]
    if chunk is None:
        return [sum(lens)]
    longest = max(cohort.prompt_lens)
    starts = range(0, longest, chunk)
    if lens and min(lens) == longest:  # all alike, which is usual: large jobs are planned often
        return [len(lens) * min(chunk, longest - start) for start in starts]
    return [sum(min(chunk, max(0, n - start)) for n in lens) for start in starts]


def everything(cohort: Cohort) -> Span:
    return Span(Tier.GPU, 0, cohort.size)


def all_room_bytes(job: Job, policy: Policy, cohorts: Cohorts) -> tuple[RoomBytes, ...]:
    """Of every room."""
    kinds = {room.index: room for room in cohorts.alike}
    sizes = {index: room_bytes(job, policy, cohorts, room) for index, room in kinds.items()}
    return tuple(sizes[room.index] for room in cohorts.alike)


def room_bytes(job: Job, policy: Policy, cohorts: Cohorts, room: Room) -> RoomBytes:
    """The most that any cohort needs in this room."""
    kv, tails, hidden = ([0] * len(spans) for spans in (room.kv, room.kv, room.hidden))
    for cohort in cohorts.possible(room):
        for place, (span, layout) in enumerate(zip(cohort.kv, cohort.layouts, strict=True)):
            if span.count and job.keep_kv:
                kv[place] = max(kv[place], layout.region_bytes)
                if span.tier is Tier.DISK:
                    tails[place] = max(tails[place], layout.segment_bytes)
        chunk = chunk_len(policy, cohort.size)
        for place, span in enumerate(cohort.hidden):
            sizes = [n * job.hidden_row_bytes for n in chunk_rows(cohort, span, chunk)]
            if span.tier is Tier.DISK:
                sizes = [aligned(size) for size in sizes]
            hidden[place] = max(hidden[place], sum(sizes))
    return RoomBytes(tuple(kv), tuple(tails), tuple(hidden))


def staging(job: Job, policy: Policy, cohorts: Cohorts) -> Staging:
    """The largest of everything that is staged, over all cohorts of the job."""
    sites = {u.site.tier for u in job.units if u.kind is UnitKind.LAYER}
    prompt = dict.fromkeys(sites, 0)
    prompt_host = kv_slot = kv_host = pages = 0
    attends = job.has_accelerator and policy.attention is AttentionSite.CPU
    any_disk = any(s.tier is Tier.DISK for room in cohorts.rooms for s in room.hidden)
    for room in {room.index: room for room in cohorts.alike}.values():
        for cohort in cohorts.possible(room):
            chunk = chunk_len(policy, cohort.size)
            chunked = len(chunk_rows(cohort, everything(cohort), chunk)) > 1
            pairs = [(s, x) for s, x in zip(cohort.kv, cohort.layouts, strict=True) if s.count]
            for site in sites:
                staged = sum(
                    layout.prompt_bytes
                    for span, layout in pairs
                    if (job.keep_kv and span.tier is not site and not (site is Tier.CPU and span.tier is Tier.GPU))
                    or (not job.keep_kv and chunked)
                )  # fmt: skip
                prompt[site] = max(prompt[site], staged)
            if job.keep_kv:
                disk = [layout for span, layout in pairs if span.tier is Tier.DISK]
                if Tier.GPU in sites:
                    prompt_host = max(prompt_host, sum(x.prompt_bytes for x in disk))
                kv_host = max([kv_host, *(x.region_bytes for x in disk)])
                away = [x for span, x in pairs if span.tier is not Tier.GPU]
                if Tier.GPU in sites and not attends:
                    kv_slot = max([kv_slot, *(x.region_bytes for x in away)])
            if any_disk:
                rows = max(chunk_rows(cohort, everything(cohort), chunk))
                pages = max(pages, aligned(rows * job.hidden_row_bytes) + len(cohort.hidden) * PAGE)
    size = max(len(group) for group in cohorts.groups)
    if any_disk:  # in decode, every sequence may be a part of its own
        pages = max(pages, max(policy.gpu_batch_size, size) * aligned(job.hidden_row_bytes))
    split = attends and Tier.GPU in sites and any(
        s.tier is not Tier.GPU for room in cohorts.rooms for s in room.kv
    )  # fmt: skip
    together = max(1, policy.gpu_batch_size // size)
    apart = -(-len(cohorts.rooms) // together) if split and job.keep_kv else 0
    return Staging(job.stages, apart, prompt, prompt_host, kv_slot, kv_host, pages)
