"""Steps of a layer that several ranks share: each computes a slice of it, and what they make is added up.

OUTPUT then ends behind the output projection, and leaves this rank's part of a sum. REDUCE makes of the parts of all
ranks the sum, the same on each of them, in host memory. MLP goes on from there to its own part of the next sum, and ADD
makes hidden states of that. Where attention and MLP are added to the same, OUTPUT does both, and there is one sum.

All ranks emit the same steps in the same order: a micro-batch's sums meet those of the other ranks without a name.
While a sum is on its way, the next micro-batch is computed (``generator.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.hidden import working_buffers
from flexgen_bench.schedule.micro_batch import MicroBatch
from flexgen_bench.schedule.scheduled_job import ScheduledJob, Unit
from flexgen_bench.schedule.steps import Step, StepKind
from flexgen_bench.schedule.weights import Blob


def part_buffers(unit: Unit, micro_batch: MicroBatch) -> tuple[Buffer, ...]:
    """Where a rank's part of a sum is made."""
    return (micro_batch.buffer("partial" if unit.site.is_accelerator else "sum"),)


def reduced_bytes(job: ScheduledJob, rows: int) -> int:
    """Bytes that each rank sends for the sum of so many rows, and receives: twice its share of them to each of the
    others (a ring: Patarasu & Yuan 2009, section 3)."""
    return 2 * (job.slices - 1) * rows * job.hidden_row_bytes // job.slices


def summing(job: ScheduledJob, unit: Unit, micro_batch: MicroBatch) -> Iterator[Step]:
    """This rank's part of a sum, to the sum where the layer is computed."""
    moved, site = micro_batch.rows * job.hidden_row_bytes, unit.site
    on_host = (micro_batch.buffer("sum"),)
    if site.is_accelerator:
        parts = part_buffers(unit, micro_batch)
        yield Step(site.d2h, StepKind.MOVE_PARTIAL, unit.index, micro_batch, reads=parts, writes=on_host, bytes=moved)
    yield Step(
        site.net_out,
        StepKind.REDUCE,
        unit.index,
        micro_batch,
        reads=on_host,
        writes=on_host,
        bytes=reduced_bytes(job, micro_batch.rows),
    )
    if site.is_accelerator:
        reduced = (micro_batch.buffer("reduced"),)
        yield Step(site.h2d, StepKind.MOVE_REDUCED, unit.index, micro_batch, reads=on_host, writes=reduced, bytes=moved)


def sliced_mlp(job: ScheduledJob, unit: Unit, blob: Blob, micro_batch: MicroBatch) -> Iterator[Step]:
    """From the sum behind the attention to that behind the MLP."""
    residual = micro_batch.buffer("residual")
    yield Step(
        unit.site.lane,
        StepKind.MLP,
        unit.index,
        micro_batch,
        weight_buffer=blob.weight_buffer,
        dequantized_buffer=blob.dequantized_buffer,
        reads=(*blob.buffers, _reduced(unit, micro_batch), residual),
        writes=(*part_buffers(unit, micro_batch), residual),
        flops=(unit.flops_after - unit.flops_output) * micro_batch.rows,
    )
    yield from summing(job, unit, micro_batch)


def add_sum(unit: Unit, blob: Blob, micro_batch: MicroBatch) -> Step:
    """Hidden states after the layer."""
    return Step(
        unit.site.lane,
        StepKind.ADD,
        unit.index,
        micro_batch,
        weight_buffer=blob.weight_buffer,
        dequantized_buffer=blob.dequantized_buffer,
        reads=(*blob.buffers, _reduced(unit, micro_batch), micro_batch.buffer("residual")),
        writes=working_buffers(unit, micro_batch),
    )


def _reduced(unit: Unit, micro_batch: MicroBatch) -> Buffer:
    return micro_batch.buffer("reduced" if unit.site.is_accelerator else "sum")
