"""Steps of a mixture's experts that are placed apart from their layer.

OUTPUT (or LAYER) then ends before them: it leaves the residual stream, what experts read, and which experts each token
is routed to. If they are computed where their layer is, EXPERTS adds what they make. If not, what they read is moved to
them and what they make is moved back, and ADD_EXPERTS adds it; hidden states stay where the layer is.
"""

from __future__ import annotations

from collections.abc import Iterator

from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.hidden import link, working_buffers
from flexgen_bench.schedule.micro_batch import MicroBatch
from flexgen_bench.schedule.scheduled_job import ScheduledJob, Unit
from flexgen_bench.schedule.steps import Step, StepKind
from flexgen_bench.schedule.weights import WeightStream


def state_buffers(micro_batch: MicroBatch) -> tuple[Buffer, ...]:
    """What a layer leaves for its experts and for who adds what they make."""
    return micro_batch.buffer("residual"), micro_batch.buffer("routed")


def are_away(unit: Unit, experts: Unit | None) -> bool:
    """Whether a layer's experts are computed elsewhere."""
    return experts is not None and experts.site is not unit.site


def expert_steps(
    job: ScheduledJob, unit: Unit, experts: Unit, weights: WeightStream, micro_batch: MicroBatch
) -> Iterator[Step]:
    """Load what is to be loaded once the routing is known, and compute."""
    residual, routed = state_buffers(micro_batch)
    if experts.on_demand and experts.path:
        yield from weights.load_touched(experts, micro_batch, routed)
    away = are_away(unit, experts)
    if away:
        moved = micro_batch.buffer(f"routed.{experts.site.name}")
        yield Step(
            link(unit.site, experts.site),
            StepKind.MOVE_ROUTED,
            experts.index,
            micro_batch,
            reads=(routed,),
            writes=(moved,),
            bytes=micro_batch.rows * job.routed_row_bytes,
        )
        routed = moved
    blob = weights.where(experts)
    made = micro_batch.buffer("added")
    yield Step(
        experts.site.lane,
        StepKind.EXPERTS,
        experts.index,
        micro_batch,
        weight_buffer=blob.weight_buffer,
        reads=(*blob.buffers, routed) if away else (*blob.buffers, routed, residual),
        writes=(made,) if away else working_buffers(unit, micro_batch),
        flops=experts.flops_after * micro_batch.rows,
    )
    if away:
        yield Step(
            link(experts.site, unit.site),
            StepKind.MOVE_EXPERTS,
            experts.index,
            micro_batch,
            reads=(made,),
            writes=(micro_batch.buffer(f"added.{unit.site.name}"),),
            bytes=micro_batch.rows * job.hidden_row_bytes,
        )


def add_experts(unit: Unit, micro_batch: MicroBatch) -> Step:
    """What experts have made elsewhere, to the residual stream of their layer."""
    return Step(
        unit.site.lane,
        StepKind.ADD_EXPERTS,
        unit.index,
        micro_batch,
        reads=(micro_batch.buffer("residual"), micro_batch.buffer(f"added.{unit.site.name}")),
        writes=working_buffers(unit, micro_batch),
    )
