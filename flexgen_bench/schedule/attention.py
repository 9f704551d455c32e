"""Steps between the projection of q, k, v and the output projection: the attention and its KV cache."""

from __future__ import annotations

from collections.abc import Iterator

from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.schedule.job import Job, Span, Unit, Work
from flexgen_bench.schedule.steps import Buffer, Step, StepKind


def attention_buffers(work: Work) -> tuple[Buffer, ...]:
    """Where the attention's output lies: one buffer per span in decode, one for all in prefill."""
    parts = range(len(work.batch.kv)) if work.token else (0,)
    return tuple(work.buffer("attn", part) for part in parts)


def attention_steps(job: Job, unit: Unit, work: Work) -> Iterator[Step]:
    """Prefill attends on the compute device over the keys just made; decode attends over the cache, span by span."""
    if work.token == 0:
        yield from _prefill(job, unit, work)
        return
    for part, span in enumerate(work.batch.kv):
        if job.attends_on_cpu(span):
            yield from _decode_on_cpu(job, unit, work, part, span)
        else:
            yield from _decode_on_compute(job, unit, work, part, span)


def _home(unit: Unit, work: Work, part: int) -> Buffer:
    return Buffer("kv", work.batch.index, unit.index, part)


def _appendix(unit: Unit, work: Work, part: int) -> Buffer:
    """What one more token is written to. On disk that is the unfinished tail segment, kept in host memory."""
    if work.batch.kv[part].tier is Tier.DISK:
        return Buffer("kv_tail", work.batch.index, unit.index, part)
    return _home(unit, work, part)


def _prefill(job: Job, unit: Unit, work: Work) -> Iterator[Step]:
    batch = work.batch
    spans = tuple(enumerate(batch.kv)) if job.keep_kv else ()
    kept = tuple(
        _home(unit, work, part) if span.tier is job.compute_tier else work.buffer("kv_new", part)
        for part, span in spans
    )
    pairs = sum(length * (length + 1) // 2 for length in batch.prompt_lens)
    yield Step(
        job.compute_lane, StepKind.ATTEND, unit.index, batch.index, stage=work.stage,
        reads=(work.buffer("qkv"),), writes=(*attention_buffers(work), *kept),
        flops=pairs * job.attention_flops_per_pair,
    )  # fmt: skip
    for part, span in spans:
        if span.tier is job.compute_tier:
            continue
        moved = job.kv_layouts[batch.index][part].prompt_bytes
        source = kept[part]
        if span.tier is Tier.DISK and job.has_accelerator:
            source = work.buffer("kv_new_host", part)
            yield Step(
                Lane.D2H, StepKind.STORE_KV, unit.index, batch.index, part, stage=work.stage,
                reads=(kept[part],), writes=(source,), bytes=moved,
            )  # fmt: skip
        yield Step(
            Lane.DISK_WRITE if span.tier is Tier.DISK else Lane.D2H,
            StepKind.STORE_KV, unit.index, batch.index, part, stage=work.stage,
            reads=(source,), writes=(_home(unit, work, part),), bytes=moved,
        )  # fmt: skip


def _decode_on_compute(job: Job, unit: Unit, work: Work, part: int, span: Span) -> Iterator[Step]:
    batch, token = work.batch, work.token
    layout = job.kv_layouts[batch.index][part]
    cache, load = _in_memory(job, unit, work, part, span)
    yield from load
    appendix = _appendix(unit, work, part)
    away = (
        job.has_accelerator and span.tier is not Tier.GPU
    )  # the cache lives in host memory or below
    if away:
        moving = work.buffer("kv_slot", part)
        yield Step(
            Lane.H2D, StepKind.LOAD_KV, unit.index, batch.index, part, stage=work.stage, token=token,
            reads=(cache, appendix), writes=(moving,),
            bytes=layout.prefix_bytes(layout.used_segments(token - 1)),
        )  # fmt: skip
        cache = moving
    new = work.buffer("kv_new", part)
    yield Step(
        job.compute_lane, StepKind.ATTEND, unit.index, batch.index, part, stage=work.stage,
        token=token, reads=(work.buffer("qkv"), cache),
        writes=(work.buffer("attn", part), new if away else appendix),
        flops=_attend_flops(job, work, span),
    )  # fmt: skip
    if away:
        staged = work.buffer("kv_new_host", part)
        yield Step(
            Lane.D2H, StepKind.STORE_KV, unit.index, batch.index, part, stage=work.stage,
            token=token, reads=(new,), writes=(staged,), bytes=span.count * layout.token_bytes,
        )  # fmt: skip
        yield Step(
            Lane.CPU, StepKind.APPEND_KV, unit.index, batch.index, part, stage=work.stage,
            token=token, reads=(staged,), writes=(appendix,),
        )  # fmt: skip
    yield from _flush(job, unit, work, part, span)


def _decode_on_cpu(job: Job, unit: Unit, work: Work, part: int, span: Span) -> Iterator[Step]:
    """Queries go down, the cache stays, the attention output comes back up."""
    batch, token = work.batch, work.token
    query, result = work.buffer("qkv_host", part), work.buffer("attn_host", part)
    yield Step(
        Lane.D2H, StepKind.MOVE_QKV, unit.index, batch.index, part, stage=work.stage, token=token,
        reads=(work.buffer("qkv"),), writes=(query,), bytes=span.count * job.qkv_row_bytes,
    )  # fmt: skip
    cache, load = _in_memory(job, unit, work, part, span)
    yield from load
    yield Step(
        Lane.CPU, StepKind.ATTEND, unit.index, batch.index, part, stage=work.stage, token=token,
        reads=(query, cache), writes=(result, _appendix(unit, work, part)),
        flops=_attend_flops(job, work, span),
    )  # fmt: skip
    yield Step(
        Lane.H2D, StepKind.MOVE_ATTENTION, unit.index, batch.index, part, stage=work.stage,
        token=token, reads=(result,), writes=(work.buffer("attn", part),),
        bytes=span.count * job.attention_row_bytes,
    )  # fmt: skip
    yield from _flush(job, unit, work, part, span)


def _in_memory(
    job: Job, unit: Unit, work: Work, part: int, span: Span
) -> tuple[Buffer, tuple[Step, ...]]:
    """The buffer where a span's cache can be read in memory, and the step that brings it there from disk."""
    home = _home(unit, work, part)
    if span.tier is not Tier.DISK:
        return home, ()
    layout = job.kv_layouts[work.batch.index][part]
    host = work.buffer("kv_host", part)
    load = Step(
        Lane.DISK_READ, StepKind.LOAD_KV, unit.index, work.batch.index, part, stage=work.stage,
        token=work.token, reads=(home,), writes=(host,),
        bytes=layout.prefix_bytes(layout.full_segments(work.token - 1)),
    )  # fmt: skip
    return host, (load,)


def _flush(job: Job, unit: Unit, work: Work, part: int, span: Span) -> Iterator[Step]:
    """A tail segment of a cache on disk is written once, when it is complete."""
    layout = job.kv_layouts[work.batch.index][part]
    if span.tier is Tier.DISK and work.token % layout.segment_tokens == 0:
        yield Step(
            Lane.DISK_WRITE, StepKind.STORE_KV, unit.index, work.batch.index, part,
            stage=work.stage, token=work.token, reads=(_appendix(unit, work, part),),
            writes=(_home(unit, work, part),), bytes=layout.segment_bytes,
        )  # fmt: skip


def _attend_flops(job: Job, work: Work, span: Span) -> int:
    cached = sum(work.batch.prompt_lens[span.start : span.stop]) + span.count * work.token
    return cached * job.attention_flops_per_pair
