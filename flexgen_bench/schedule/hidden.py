"""Steps that move hidden states between their home and the compute tier, between layers."""

from __future__ import annotations

from collections.abc import Iterator

from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.schedule.job import Job, Unit, Work
from flexgen_bench.schedule.steps import Buffer, Step, StepKind


def working_buffers(job: Job, work: Work) -> tuple[Buffer, ...]:
    """What a compute step on a micro-batch's hidden states touches: the staging slot for spans that live
    elsewhere, and the homes of the spans that live on the compute tier."""
    batch = work.batch
    homes = tuple(
        Buffer("hidden", batch.index, part=part)
        for part, span in enumerate(batch.hidden)
        if span.tier is job.compute_tier
    )
    if len(homes) == len(batch.hidden):
        return homes
    return (work.buffer("x"), *homes)


def load_hidden(job: Job, unit: Unit, work: Work) -> Iterator[Step]:
    """Bring every span of the hidden states that is not on the compute tier there."""
    batch, token, x = work.batch, work.token, work.buffer("x")
    for part, span in enumerate(batch.hidden):
        if span.tier is job.compute_tier:
            continue
        moved = batch.tokens(token, span) * job.hidden_row_bytes
        source = Buffer("hidden", batch.index, part=part)
        if span.tier is Tier.DISK and job.has_accelerator:
            host = work.buffer("x_host", part)
            yield Step(
                Lane.DISK_READ, StepKind.LOAD_HIDDEN, unit.index, batch.index, part, stage=work.stage, token=token,
                reads=(source,), writes=(host,), bytes=moved,
            )  # fmt: skip
            source = host
        yield Step(
            Lane.H2D if job.has_accelerator else Lane.DISK_READ,
            StepKind.LOAD_HIDDEN, unit.index, batch.index, part, stage=work.stage, token=token,
            reads=(source,), writes=(x,), bytes=moved,
        )  # fmt: skip


def store_hidden(job: Job, unit: Unit, work: Work) -> Iterator[Step]:
    """Bring every span of the hidden states that does not live on the compute tier home."""
    batch, token, x = work.batch, work.token, work.buffer("x")
    for part, span in enumerate(batch.hidden):
        if span.tier is job.compute_tier:
            continue
        moved = batch.tokens(token, span) * job.hidden_row_bytes
        source = x
        if span.tier is Tier.DISK and job.has_accelerator:
            source = work.buffer("x_host", part)
            yield Step(
                Lane.D2H, StepKind.STORE_HIDDEN, unit.index, batch.index, part, stage=work.stage, token=token,
                reads=(x,), writes=(source,), bytes=moved,
            )  # fmt: skip
        yield Step(
            Lane.DISK_WRITE if span.tier is Tier.DISK else Lane.D2H,
            StepKind.STORE_HIDDEN, unit.index, batch.index, part, stage=work.stage, token=token,
            reads=(source,), writes=(Buffer("hidden", batch.index, part=part),), bytes=moved,
        )  # fmt: skip
