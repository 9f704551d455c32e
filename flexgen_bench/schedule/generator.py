"""The schedule, said once: which steps a pass consists of, in program order.

The engine executes these steps, the planner sums and simulates them. A pass sweeps all units once; each loaded
unit serves every micro-batch, whether that one is in prefill or in decode. Nothing here waits for anything: what a step
must wait for follows from the buffers it reads and writes (``dependencies.py``), so loads for the next layer and the
next micro-batch run ahead as far as their staging buffers allow.

Buffers, and who writes them (tier is where the buffer lies):
    resident(u), weights.tier(slot), plain(slot)     a unit's blob: in place / staged / unpacked
    tokens(KV slot)            next tokens of a KV slot's sequence group    <- SAMPLE
    rows(stage)             gathered embedding rows           <- GATHER_ROWS, MOVE_ROWS
    x.tier(stage)           hidden states being worked on     <- EMBED, LOAD_HIDDEN, OUTPUT
    hidden(KV slot, chunk, part)  hidden states at home          <- STORE_HIDDEN (or EMBED, OUTPUT if computed where
    they live) qkv, attn(stage)        around the attention              <- PROJECT, ATTEND
    residual(stage)         hidden states before it, for OUTPUT <- PROJECT
    kv(KV slot, layer, part)   keys and values at home           <- ATTEND, STORE_KV, APPEND_KV
    kv_tail(KV slot, layer, part) the unfinished segment of a cache on disk, in host memory
    kv_slot, kv_host(slot)  keys and values being moved       <- LOAD_KV
    kv_new.tier(slot)       a prompt's keys and values on their way home <- ATTEND
    kv_token(stage, part)   a token's, on their way home      <- ATTEND
    logits(stage)           what sampling needs               <- HEAD
    ..._host, gpu_rows      the same on the other side of a link <- MOVE_..., STORE_KV
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.schedule.attention import attention_buffers, attention_steps
from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.hidden import load_hidden, store_hidden, working_buffers
from flexgen_bench.schedule.micro_batch import Member, MicroBatch
from flexgen_bench.schedule.scheduled_job import ScheduledJob, Unit, UnitKind
from flexgen_bench.schedule.steps import Step, StepKind
from flexgen_bench.schedule.weights import Blob, WeightStream


def pass_steps(
    job: ScheduledJob, weights: WeightStream, batches: Sequence[MicroBatch], is_last: bool
) -> Iterator[Step]:
    """All steps of one pass over ``batches``; chunks of one prompt follow each other. ``is_last``: load nothing beyond
    it.

    Decoding micro-batches that the cpu attends for are taken apart at the attention: their projections come first, then
    the other micro-batches (prefill, mostly) while the cpu attends, then output and MLP, each directly followed by the
    same micro-batch's projection in the next layer. So the accelerator, the cpu and the links always have a micro-batch
    to work on.
    """
    weights.begin_pass(is_last)
    apart: list[MicroBatch] = []
    others: list[MicroBatch] = []
    for batch in batches:
        (apart if uses_cpu_attention(job, batch.members) else others).append(batch)
    projected = False  # whether the layer's projections of ``apart`` were emitted with the layer before
    for unit, following in zip(job.units, [*job.units[1:], None], strict=True):
        yield from weights.ready(unit)
        blob = weights.where(unit)
        if unit.kind is UnitKind.LAYER:
            ahead = following is not None and _may_overlap(job, unit, following)
            split = apart if unit.site.is_accelerator else []
            whole = others if split else batches
            if not projected:
                for batch in split:
                    yield from _before_attention(job, unit, blob, batch)
            for batch in whole:
                yield from _before_attention(job, unit, blob, batch)
                yield from _after_attention(job, unit, blob, batch)
            projected = bool(split) and ahead
            for batch in split:
                yield from _after_attention(job, unit, blob, batch)
                if projected:
                    assert following is not None
                    yield from weights.ready(following)
                    yield from _before_attention(job, following, weights.where(following), batch)
        else:
            for batch in batches:
                yield from (_embed if unit.kind is UnitKind.EMBED else _head)(job, unit, blob, batch)
        yield from weights.done(unit)


def uses_cpu_attention(job: ScheduledJob, members: Sequence[Member]) -> bool:
    """Whether the cpu attends for a micro-batch of these members while an accelerator computes the rest."""
    return job.delegates_attention and any(
        member.token and span.count and span.tier is not Tier.GPU for member in members for span in member.group.kv
    )


def _may_overlap(job: ScheduledJob, unit: Unit, following: Unit) -> bool:
    """Whether two neighbouring layers can be in use at once: both on the accelerator, with a slot for each."""
    return (
        following.kind is UnitKind.LAYER
        and following.site.is_accelerator
        and (job.weight_buffers > 1 or not following.is_streamed)
        and (job.dequantized_buffers > 1 or not following.unpack)
    )


def _embed(job: ScheduledJob, unit: Unit, blob: Blob, work: MicroBatch) -> Iterator[Step]:
    tokens = tuple(Buffer("tokens", member.group.kv_slot) for member in work.members)
    rows = work.buffer("rows")
    moved = work.rows * job.embed_row_bytes
    source = tokens
    if unit.tier is not unit.site.tier:  # only the rows that are needed leave the table
        # By the cpu even from disk: on the disk's lane, weights would wait behind it for the tokens.
        yield Step(Lane.CPU, StepKind.GATHER_ROWS, unit.index, work, reads=tokens, writes=(rows,))
        source = (rows,)
        if unit.site.is_accelerator:
            source = (work.buffer("gpu_rows"),)
            yield Step(Lane.H2D, StepKind.MOVE_ROWS, unit.index, work, reads=(rows,), writes=source, bytes=moved)
    yield Step(
        unit.site.lane,
        StepKind.EMBED,
        unit.index,
        work,
        weight_buffer=blob.weight_buffer,
        dequantized_buffer=blob.dequantized_buffer,
        reads=(*blob.buffers, *source),
        writes=working_buffers(unit, work),
        flops=unit.flops_before * work.rows,
    )
    yield from store_hidden(job, unit, work)


def _before_attention(job: ScheduledJob, unit: Unit, blob: Blob, work: MicroBatch) -> Iterator[Step]:
    yield from load_hidden(job, unit, work)
    yield Step(
        unit.site.lane,
        StepKind.PROJECT,
        unit.index,
        work,
        weight_buffer=blob.weight_buffer,
        dequantized_buffer=blob.dequantized_buffer,
        reads=(*blob.buffers, *working_buffers(unit, work)),
        writes=(work.buffer("qkv"), work.buffer("residual")),
        flops=unit.flops_before * work.rows,
    )
    yield from attention_steps(job, unit, work)


def _after_attention(job: ScheduledJob, unit: Unit, blob: Blob, work: MicroBatch) -> Iterator[Step]:
    yield Step(
        unit.site.lane,
        StepKind.OUTPUT,
        unit.index,
        work,
        weight_buffer=blob.weight_buffer,
        dequantized_buffer=blob.dequantized_buffer,
        reads=(*blob.buffers, *attention_buffers(work), work.buffer("residual")),
        writes=working_buffers(unit, work),
        flops=unit.flops_after * work.rows,
    )
    if work.logit_rows or job.units[unit.index + 1].kind is UnitKind.LAYER:
        yield from store_hidden(job, unit, work)


def _head(job: ScheduledJob, unit: Unit, blob: Blob, work: MicroBatch) -> Iterator[Step]:
    """Logits of the logit rows only; a chunk that ends no prompt has none."""
    if not work.logit_rows:
        return
    logits = work.buffer("logits")
    yield from load_hidden(job, unit, work)
    yield Step(
        unit.site.lane,
        StepKind.HEAD,
        unit.index,
        work,
        weight_buffer=blob.weight_buffer,
        dequantized_buffer=blob.dequantized_buffer,
        reads=(*blob.buffers, *working_buffers(unit, work)),
        writes=(logits,),
        flops=unit.flops_before * len(work.logit_rows),
    )
    if unit.site.is_accelerator:
        on_host = work.buffer("host_logits")
        yield Step(
            Lane.D2H,
            StepKind.MOVE_LOGITS,
            unit.index,
            work,
            reads=(logits,),
            writes=(on_host,),
            bytes=len(work.logit_rows) * job.logits_row_bytes,
        )
        logits = on_host
    yield Step(
        Lane.CPU,
        StepKind.SAMPLE,
        unit.index,
        work,
        reads=(logits,),
        writes=tuple(Buffer("tokens", m.group.kv_slot) for m in work.members),
    )
