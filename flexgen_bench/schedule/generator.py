"""The schedule, said once: which steps a pass consists of, in program order.

The engine executes these steps, the planner sums and simulates them. A pass sweeps all units once; each loaded
unit serves every micro-batch. Nothing here waits for anything: what a step must wait for follows from the
buffers it reads and writes (``dependencies.py``), so loads for the next layer and the next micro-batch run
ahead as far as their staging slots allow.

Buffers, and who writes them:
    resident(u), weights(slot), host_weights(slot)   a unit's blob: in place / staged on the compute tier / in host memory
    tokens(b)               next tokens of micro-batch b      <- SAMPLE
    rows(stage)             gathered embedding rows           <- GATHER_ROWS, MOVE_ROWS
    x(stage)                hidden states being worked on     <- EMBED, LOAD_HIDDEN, OUTPUT
    hidden(b, part)         hidden states at home             <- STORE_HIDDEN (or EMBED, OUTPUT if home is the compute tier)
    qkv, attn(stage)        around the attention              <- PROJECT, ATTEND
    kv(b, layer, part)      keys and values at home           <- ATTEND, STORE_KV, APPEND_KV
    kv_tail(b, layer, part) the unfinished segment of a cache on disk, in host memory
    kv_slot, kv_host(stage) keys and values being moved       <- LOAD_KV
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.schedule.attention import attention_buffers, attention_steps
from flexgen_bench.schedule.hidden import load_hidden, store_hidden, working_buffers
from flexgen_bench.schedule.job import Job, Unit, UnitKind, Work
from flexgen_bench.schedule.steps import Buffer, Step, StepKind
from flexgen_bench.schedule.weights import WeightStream


def pass_steps(
    job: Job, weights: WeightStream, pass_index: int, work: Sequence[Work], last_pass: bool
) -> Iterator[Step]:
    """All steps of one pass over ``work``. ``last_pass``: do not prefetch weights beyond it."""
    for unit in job.units:
        yield from weights.ahead_of(unit, pass_index, last_pass)
        blob, slot = weights.where(unit, pass_index)
        match unit.kind:
            case UnitKind.EMBED:
                for item in work:
                    yield from _embed(job, unit, blob, slot, item)
            case UnitKind.LAYER:
                yield from _layer(job, unit, blob, slot, work)
            case UnitKind.HEAD:
                for item in work:
                    yield from _head(job, unit, blob, slot, item)


def _embed(job: Job, unit: Unit, blob: Buffer, slot: int, work: Work) -> Iterator[Step]:
    batch, token = work.batch, work.token
    tokens = Buffer("tokens", batch.index)
    rows = work.buffer("rows")
    moved = batch.tokens(token) * job.embed_row_bytes
    source = tokens
    if unit.tier is not job.compute_tier:  # only the rows that are needed leave the table
        lane = Lane.DISK_READ if unit.tier is Tier.DISK else Lane.CPU
        yield Step(
            lane, StepKind.GATHER_ROWS, unit.index, batch.index, stage=work.stage, token=token,
            reads=(tokens,), writes=(rows,), bytes=moved if unit.tier is Tier.DISK else 0,
        )  # fmt: skip
        source = rows
        if job.has_accelerator:
            source = work.buffer("gpu_rows")
            yield Step(
                Lane.H2D, StepKind.MOVE_ROWS, unit.index, batch.index, stage=work.stage, token=token,
                reads=(rows,), writes=(source,), bytes=moved,
            )  # fmt: skip
    yield Step(
        job.compute_lane, StepKind.EMBED, unit.index, batch.index, slot=slot, stage=work.stage, token=token,
        reads=(blob, source), writes=working_buffers(job, work), flops=unit.flops_before * batch.tokens(token),
    )  # fmt: skip
    yield from store_hidden(job, unit, work)


def _layer(job: Job, unit: Unit, blob: Buffer, slot: int, work: Sequence[Work]) -> Iterator[Step]:
    """A decoder layer. When the cpu attends for an accelerator, the next micro-batch's projection goes before
    this one's output, so that both devices always have a micro-batch to work on."""
    pending: Work | None = None
    for item in work:
        yield from _before_attention(job, unit, blob, slot, item)
        if pending is not None:
            yield from _after_attention(job, unit, blob, slot, pending)
            pending = None
        if any(job.attends_on_cpu(span) for span in item.batch.kv):
            pending = item
        else:
            yield from _after_attention(job, unit, blob, slot, item)
    if pending is not None:
        yield from _after_attention(job, unit, blob, slot, pending)


def _before_attention(job: Job, unit: Unit, blob: Buffer, slot: int, work: Work) -> Iterator[Step]:
    batch, token = work.batch, work.token
    yield from load_hidden(job, unit, work)
    yield Step(
        job.compute_lane, StepKind.PROJECT, unit.index, batch.index, slot=slot, stage=work.stage, token=token,
        reads=(blob, *working_buffers(job, work)), writes=(work.buffer("qkv"),),
        flops=unit.flops_before * batch.tokens(token),
    )  # fmt: skip
    yield from attention_steps(job, unit, work)


def _after_attention(job: Job, unit: Unit, blob: Buffer, slot: int, work: Work) -> Iterator[Step]:
    batch, token = work.batch, work.token
    yield Step(
        job.compute_lane, StepKind.OUTPUT, unit.index, batch.index, slot=slot, stage=work.stage, token=token,
        reads=(blob, *attention_buffers(work)), writes=working_buffers(job, work),
        flops=unit.flops_after * batch.tokens(token),
    )  # fmt: skip
    yield from store_hidden(job, unit, work)


def _head(job: Job, unit: Unit, blob: Buffer, slot: int, work: Work) -> Iterator[Step]:
    batch, token = work.batch, work.token
    logits = work.buffer("logits")
    yield from load_hidden(job, unit, work)
    yield Step(
        job.compute_lane, StepKind.HEAD, unit.index, batch.index, slot=slot, stage=work.stage, token=token,
        reads=(blob, *working_buffers(job, work)), writes=(logits,), flops=unit.flops_before * batch.size,
    )  # fmt: skip
    if job.has_accelerator:
        on_host = work.buffer("host_logits")
        yield Step(
            Lane.D2H, StepKind.MOVE_LOGITS, unit.index, batch.index, stage=work.stage, token=token,
            reads=(logits,), writes=(on_host,), bytes=batch.size * job.logits_row_bytes,
        )  # fmt: skip
        logits = on_host
    yield Step(
        Lane.CPU, StepKind.SAMPLE, unit.index, batch.index, stage=work.stage, token=token,
        reads=(logits,), writes=(Buffer("tokens", batch.index),),
    )  # fmt: skip
