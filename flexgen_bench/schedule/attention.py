"""Steps between the projection of q, k, v and the output projection: the attention and its KV cache."""

from __future__ import annotations

from collections.abc import Iterator

from flexgen_bench.core.tiers import Tier
from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.micro_batch import MicroBatch, Part
from flexgen_bench.schedule.scheduled_job import ScheduledJob, Unit
from flexgen_bench.schedule.steps import Step, StepKind


def attention_buffers(micro_batch: MicroBatch) -> tuple[Buffer, ...]:
    """Where the attention's output lies: one buffer per part in decode, one for all in prefill."""
    buffers = micro_batch.known.get("attn")
    if buffers is None:
        parts = range(len(micro_batch.kv_parts)) if micro_batch.token else (0,)
        buffers = micro_batch.known["attn"] = tuple(micro_batch.buffer("attn", part) for part in parts)
    return buffers


def is_resident(job: ScheduledJob, unit: Unit, micro_batch: MicroBatch) -> bool:
    """Whether a micro-batch decodes and all of its cache of this layer lies where the layer is computed. (A prompt's
    steps are long: one more or less is not felt, and its keys and values may be wanted elsewhere before its layer is
    done.)"""
    here = unit.site.tier
    return not micro_batch.is_prefill and all(job.kv_tier(unit, part) is here for part in micro_batch.kv_parts)


def cache_homes(unit: Unit, micro_batch: MicroBatch) -> tuple[Buffer, ...]:
    """Where the cache of every part of a resident micro-batch lies."""
    return tuple(_home(unit, part) for part in micro_batch.kv_parts)


def attention_steps(job: ScheduledJob, unit: Unit, micro_batch: MicroBatch) -> Iterator[Step]:
    """Prefill attends at the site over the keys just made; decode attends over the cache, part by part. Of a divided
    micro-batch: up to where the cpu attends (``joining_steps`` are the rest)."""
    if micro_batch.is_prefill:
        yield from _prefill(job, unit, micro_batch)
        return
    divided = _is_divided(unit, micro_batch)
    for part in micro_batch.kv_parts:
        if job.attends_on_cpu(unit, part):
            yield from _decode_on_cpu(job, unit, micro_batch, part)
            if not divided:
                yield _returned(job, unit, micro_batch, part)
            yield from _flush(unit, micro_batch, part)
        elif not (divided and part.span.is_moved):
            yield from _decode_at_site(job, unit, micro_batch, part)


def joining_steps(job: ScheduledJob, unit: Unit, micro_batch: MicroBatch) -> Iterator[Step]:
    """Of a micro-batch that is attended to in several places: what is moved is attended to, and what the cpu has made
    comes back.

    Directly before the output, and not with the rest of the attention: there the link would wait for the cpu before it
    could bring the next micro-batch's cache, and the accelerator for that cache before it could project for the cpu.
    """
    if not _is_divided(unit, micro_batch):
        return
    for part in micro_batch.kv_parts:
        if part.span.is_moved:
            yield from _decode_at_site(job, unit, micro_batch, part)
    for part in micro_batch.kv_parts:
        if job.attends_on_cpu(unit, part):
            yield _returned(job, unit, micro_batch, part)


def _is_divided(unit: Unit, micro_batch: MicroBatch) -> bool:
    return unit.site.is_accelerator and not micro_batch.is_prefill and micro_batch.is_divided


def _home(unit: Unit, part: Part) -> Buffer:
    return Buffer("kv", part.group.kv_slot, unit.index, part.home)


def _appendix(unit: Unit, part: Part) -> Buffer:
    """What one more token is written to. On disk that is the unfinished tail segment, kept in host memory."""
    if part.tier is Tier.DISK:
        return Buffer("kv_tail", part.group.kv_slot, unit.index, part.home)
    return _home(unit, part)


def _prefill(job: ScheduledJob, unit: Unit, micro_batch: MicroBatch) -> Iterator[Step]:
    """The prompt's keys and values gather in place, or in a staging buffer that is sent home after the last chunk."""
    chunk = micro_batch.members[0]
    parts = micro_batch.kv_parts if job.keep_kv or not (chunk.start == 0 and chunk.is_last_chunk) else ()
    here = {p.index: job.keep_kv and job.kv_tier(unit, p) is unit.site.tier for p in parts}
    kept = tuple(_home(unit, p) if here[p.index] else _staged(unit, micro_batch) for p in parts)
    yield Step(
        unit.site.lane,
        StepKind.ATTEND,
        unit.index,
        micro_batch,
        reads=(micro_batch.buffer("qkv"), *(kept if chunk.start else ())),
        writes=(*attention_buffers(micro_batch), *kept),
        flops=job.attention_flops_per_pair * micro_batch.prompt_pairs(unit.window),
    )
    if not job.keep_kv or not chunk.is_last_chunk:
        return
    for part, source in zip(parts, kept, strict=True):
        if here[part.index]:
            continue
        yield from _store_prompt(unit, micro_batch, part, source)


def _store_prompt(unit: Unit, micro_batch: MicroBatch, part: Part, source: Buffer) -> Iterator[Step]:
    moved = part.layout(unit.ring).prompt_bytes
    if part.tier is Tier.DISK and unit.site.is_accelerator:
        staged = Buffer("kv_new_host", micro_batch.prompt_buffer)
        yield Step(
            unit.site.d2h,
            StepKind.STORE_KV,
            unit.index,
            micro_batch,
            part.index,
            reads=(source,),
            writes=(staged,),
            bytes=moved,
        )
        source = staged
    yield Step(
        unit.site.disk_write if part.tier is Tier.DISK else unit.site.d2h,
        StepKind.STORE_KV,
        unit.index,
        micro_batch,
        part.index,
        reads=(source,),
        writes=(_home(unit, part),),
        bytes=moved,
    )


def _staged(unit: Unit, micro_batch: MicroBatch) -> Buffer:
    """One buffer for all parts: where each lies in it depends on the others."""
    return Buffer(f"kv_new.{unit.site.name}", micro_batch.prompt_buffer)


def _decode_at_site(job: ScheduledJob, unit: Unit, micro_batch: MicroBatch, part: Part) -> Iterator[Step]:
    layout = part.layout(unit.ring)
    cache, load = _in_memory(job, unit, micro_batch, part)
    yield from load
    appendix = _appendix(unit, part)
    # The cache lives in host memory or below, and is moved to the accelerator.
    away = unit.site.is_accelerator and part.tier is not Tier.GPU
    if away:
        moving = Buffer("kv_moved", part.kv_buffer)
        yield Step(
            unit.site.h2d,
            StepKind.LOAD_KV,
            unit.index,
            micro_batch,
            part.index,
            reads=(cache, appendix),
            writes=(moving,),
            bytes=layout.moved_bytes(part.token),
        )
        cache = moving
    new = micro_batch.buffer("kv_token", part.index)
    yield Step(
        unit.site.lane,
        StepKind.ATTEND,
        unit.index,
        micro_batch,
        part.index,
        reads=(micro_batch.buffer("qkv"), cache),
        writes=(micro_batch.buffer("attn", part.index), *((new, cache) if away else (appendix,))),
        flops=attend_flops(job, unit, part),
    )
    if away:
        staged = micro_batch.buffer("kv_token_host", part.index)
        yield Step(
            unit.site.d2h,
            StepKind.STORE_KV,
            unit.index,
            micro_batch,
            part.index,
            reads=(new,),
            writes=(staged,),
            bytes=part.rows * layout.token_bytes,
        )
        yield Step(
            unit.site.cpu, StepKind.APPEND_KV, unit.index, micro_batch, part.index, reads=(staged,), writes=(appendix,)
        )
    yield from _flush(unit, micro_batch, part)


def _decode_on_cpu(job: ScheduledJob, unit: Unit, micro_batch: MicroBatch, part: Part) -> Iterator[Step]:
    """Queries go down, and the cache stays."""
    query, result = micro_batch.buffer("qkv_host", part.index), micro_batch.buffer("attn_host", part.index)
    yield Step(
        unit.site.d2h,
        StepKind.MOVE_QKV,
        unit.index,
        micro_batch,
        part.index,
        reads=(micro_batch.buffer("qkv"),),
        writes=(query,),
        bytes=part.rows * job.qkv_row_bytes,
    )
    cache, load = _in_memory(job, unit, micro_batch, part)
    yield from load
    yield Step(
        unit.site.cpu,
        StepKind.ATTEND,
        unit.index,
        micro_batch,
        part.index,
        reads=(query, cache),
        writes=(result, _appendix(unit, part)),
        flops=attend_flops(job, unit, part),
    )


def _returned(job: ScheduledJob, unit: Unit, micro_batch: MicroBatch, part: Part) -> Step:
    """What the cpu made of it comes back up."""
    return Step(
        unit.site.h2d,
        StepKind.MOVE_ATTENTION,
        unit.index,
        micro_batch,
        part.index,
        reads=(micro_batch.buffer("attn_host", part.index),),
        writes=(micro_batch.buffer("attn", part.index),),
        bytes=part.rows * job.attention_row_bytes,
    )


def _in_memory(job: ScheduledJob, unit: Unit, micro_batch: MicroBatch, part: Part) -> tuple[Buffer, tuple[Step, ...]]:
    """The buffer where a part's cache can be read in memory, and the step that brings it there from disk."""
    home = _home(unit, part)
    if part.tier is not Tier.DISK:
        return home, ()
    layout = part.layout(unit.ring)
    host = Buffer("kv_host", part.kv_buffer)
    load = Step(
        unit.site.disk_read,
        StepKind.LOAD_KV,
        unit.index,
        micro_batch,
        part.index,
        reads=(home,),
        writes=(host,),
        bytes=layout.read_bytes(part.token),
    )
    return host, (load,)


def _flush(unit: Unit, micro_batch: MicroBatch, part: Part) -> Iterator[Step]:
    """A tail segment of a cache on disk is written once, when it is complete, if more tokens are to attend to it."""
    layout = part.layout(unit.ring)
    is_complete = part.token % layout.segment_tokens == 0
    if part.tier is Tier.DISK and is_complete and part.token < layout.new_tokens:
        yield Step(
            unit.site.disk_write,
            StepKind.STORE_KV,
            unit.index,
            micro_batch,
            part.index,
            reads=(_appendix(unit, part),),
            writes=(_home(unit, part),),
            bytes=layout.segment_bytes,
        )


def attend_flops(job: ScheduledJob, unit: Unit, part: Part) -> int:
    """Score and value products of one token of each of a part's sequences against all that its layer lets it see."""
    return part.pairs(unit.window) * job.attention_flops_per_pair
