"""Which steps of a planned job an engine on a CUDA device replays as recorded graphs, and how many launches that is.

The conditions are those of ``engine/decode_graphs.py`` and ``engine/graphs.py``; ``tests/engine/test_pass_counts.py``
holds the launches to what the engine counts. What comes before the recording (the first two passes of a shape) is not
told apart.
"""

from __future__ import annotations

from flexgen_bench.core.policy import Schedule
from flexgen_bench.core.tiers import Tier
from flexgen_bench.models.parts import Decoder, Experts
from flexgen_bench.planner.graph_memory import graph_bytes
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.schedule.micro_batch import MicroBatch
from flexgen_bench.schedule.steps import Step, StepKind

# Of steps that are not layers. A pass begins with its embedding, and with counting up its positions.
_LAUNCHES = {StepKind.EMBED: 2, StepKind.HEAD: 1, StepKind.SAMPLE: 1}


class RecordedPasses:
    """Of a planned job."""

    def __init__(self, plan: MemoryPlan) -> None:
        lossy, self._units = plan.policy.lossy, plan.job.units
        is_plain = lossy.value_share == 1 and lossy.kv_cache is None and _is_traced(plan.model.decoder)
        # What starts and ends all the time hardly ever comes a third time.
        repeats = plan.policy.schedule is Schedule.BLOCK
        self._is_on = plan.job.tokens_stay and is_plain and repeats and _have_room(plan)

    def launches(self, step: Step) -> int | None:
        """Of a step on a lane of the accelerator; 0: done with an earlier one. None: its operators are issued."""
        if not self._is_on or step.on_weights or not _is_resident(step.micro_batch):
            return None
        if step.kind is StepKind.LAYER:
            unit = self._units[step.unit]
            return int(unit.index == 1 or unit.is_streamed or unit.unpack)
        return _LAUNCHES.get(step.kind) if step.micro_batch.samples_on_device else None


def _is_traced(decoder: Decoder) -> bool:
    """Whether layers look at no values, and one kernel attends for all of them."""
    attentions = [layer.attention for layer in decoder.kinds]
    is_plain = all(one.mod.is_none for one in attentions) and len({one.scale for one in attentions}) == 1
    return is_plain and not any(isinstance(layer.mlp, Experts) for layer in decoder.kinds)


def _is_resident(micro_batch: MicroBatch) -> bool:
    if micro_batch.is_prefill or micro_batch.hidden_tier is not Tier.GPU:
        return False
    return all(part.tier is Tier.GPU and part.layout().is_joined for part in micro_batch.kv_parts)


def _have_room(plan: MemoryPlan) -> bool:
    capacity = plan.hardware.capacity_bytes(Tier.GPU)
    return capacity is None or plan.total(Tier.GPU, plan.job.device) + graph_bytes(plan) <= capacity
