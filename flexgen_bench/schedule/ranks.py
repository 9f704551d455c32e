"""Steps between the ranks of a pipeline: hidden states from one stage to the next, tokens from the last one to all.

They are steps like all others, on lanes of their own: a network works while everything else does. Hidden states pass
through host memory on both sides. What a rank receives waits there for its turn in as many buffers as micro-batches are
staged in; a rank's first layer takes them from there, its last one leaves them on their way, and neither has them taken
home.

Each pass ends on every rank with the tokens that the last one has chosen. So all know who has ended, and schedule the
same next pass.
"""

from __future__ import annotations

from collections.abc import Iterator

from flexgen_bench.schedule.hidden import working_buffers
from flexgen_bench.schedule.micro_batch import MicroBatch
from flexgen_bench.schedule.scheduled_job import ScheduledJob, Unit
from flexgen_bench.schedule.steps import TOKEN_BYTES, Step, StepKind


def entering(job: ScheduledJob, unit: Unit, micro_batch: MicroBatch, entered: Iterator[int]) -> Iterator[Step]:
    """Hidden states of the rank before, to where a rank's first layer is computed. entered: counts the micro-batches of
    the pass that have come (``Step.part`` of ENTER: the first one begins the pass)."""
    if unit is not job.entry:
        return
    moved = micro_batch.rows * job.hidden_row_bytes
    arrived = micro_batch.buffer("inbox")
    yield Step(unit.site.net_in, StepKind.RECV_HIDDEN, unit.index, micro_batch, writes=(arrived,), bytes=moved)
    if unit.site.is_accelerator:
        inbox, arrived = arrived, micro_batch.buffer("arrived")
        yield Step(
            unit.site.h2d,
            StepKind.MOVE_RECEIVED,
            unit.index,
            micro_batch,
            reads=(inbox,),
            writes=(arrived,),
            bytes=moved,
        )
    yield Step(
        unit.site.lane,
        StepKind.ENTER,
        unit.index,
        micro_batch,
        next(entered),
        reads=(arrived,),
        writes=working_buffers(unit, micro_batch),
    )


def leaving(job: ScheduledJob, unit: Unit, micro_batch: MicroBatch) -> Iterator[Step]:
    """What a rank's last layer has made, to the next rank."""
    moved = micro_batch.rows * job.hidden_row_bytes
    outbox = micro_batch.buffer("leaving")
    yield Step(
        unit.site.lane,
        StepKind.LEAVE,
        unit.index,
        micro_batch,
        reads=working_buffers(unit, micro_batch),
        writes=(outbox,),
    )
    if unit.site.is_accelerator:
        made, outbox = outbox, micro_batch.buffer("outbox")
        yield Step(
            unit.site.d2h, StepKind.MOVE_LEAVING, unit.index, micro_batch, reads=(made,), writes=(outbox,), bytes=moved
        )
    yield Step(unit.site.net_out, StepKind.SEND_HIDDEN, unit.index, micro_batch, reads=(outbox,), bytes=moved)


def tokens_to_others(job: ScheduledJob, unit: Unit, micro_batch: MicroBatch) -> Iterator[Step]:
    """On the last rank, after its head: the chosen tokens to every other rank."""
    if job.stage is not None:
        moved = len(micro_batch.logit_rows) * TOKEN_BYTES * (job.stage.ranks - 1)
        yield Step(
            unit.site.net_out,
            StepKind.SEND_TOKENS,
            unit.index,
            micro_batch,
            reads=micro_batch.token_buffers,
            bytes=moved,
        )


def tokens_from_last(job: ScheduledJob, micro_batch: MicroBatch) -> Iterator[Step]:
    """On every other rank, at the end of a pass: the tokens of a micro-batch. On a lane of their own: they come when
    the last rank has made them, and hidden states of the next passes do not wait for that."""
    if job.exit is not None and micro_batch.logit_rows:
        yield Step(
            job.exit.site.net_tokens,
            StepKind.RECV_TOKENS,
            job.exit.index,
            micro_batch,
            writes=micro_batch.token_buffers,
            bytes=len(micro_batch.logit_rows) * TOKEN_BYTES,
        )
