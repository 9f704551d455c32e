"""What a micro-batch costs on each lane, by where weights, cache and activations are: summed from the steps of a single
layer of each kind.

Costs are linear in the shares of a placement, so the steps of a few pure placements (all of a kind on one tier) say it
all, and layers are alike but for what their caches keep, so one of each kind does.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.policy import AttentionSite, Placement, Policy, Schedule
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.models.model import Model
from flexgen_bench.planner.cost import StepCost
from flexgen_bench.planner.memory_plan import plan_job
from flexgen_bench.planner.placement_lp import MOVED, PhaseCost, Seconds
from flexgen_bench.planner.rings import LayerKinds
from flexgen_bench.schedule.scheduled_job import Unit, UnitKind
from flexgen_bench.schedule.scheduler import Scheduler
from flexgen_bench.schedule.sequence_groups import Request

_NONE: Mapping[Lane, float] = {}
_BASE = Tier.CPU  # where everything is that is not said to be elsewhere


@dataclass(frozen=True)
class MicroBatchCost:
    """Seconds per lane of a micro-batch in all layers, and of what is paid once per pass (weights, unpacking), in each
    phase."""

    prefill: PhaseCost
    decode: PhaseCost
    prefill_once: PhaseCost
    decode_once: PhaseCost

    def of_block(self, batches: float) -> tuple[PhaseCost, PhaseCost]:
        """Prefill and decode pass of a block of so many micro-batches."""
        return (_sum(self.prefill_once, self.prefill, batches), _sum(self.decode_once, self.decode, batches))


@dataclass(frozen=True)
class _Depth:
    """For how many units of a whole model one of a shallow one stands. counts: units of the whole, of each kind."""

    layers: LayerKinds
    counts: Mapping[UnitKind, int]

    def times(self, unit: Unit) -> float:
        if unit.kind is UnitKind.EXPERTS:  # not every layer may have some
            return self.layers.times(unit.companion - 1) * self.counts[unit.kind] / self.counts[UnitKind.LAYER]
        return self.layers.times(unit.index - 1) if unit.kind is UnitKind.LAYER else 1


def micro_batch_cost(model: Model, policy: Policy, hardware: HardwareProfile, request: Request) -> MicroBatchCost:
    """For the policy's micro-batches, whatever its placement; ``request`` is what each of their sequences asks."""
    thin = _thin(model, policy, request)
    base = _phases(thin, policy, hardware, request, {})
    vertices = {
        (kind, tier): _phases(thin, policy, hardware, request, {kind: tier}) if tier is not _BASE else base
        for kind in policy.placements
        for tier in hardware.tiers
    }
    phases = [
        PhaseCost(fixed, {share: _difference(sums[number], fixed) for share, sums in vertices.items()})
        for number, fixed in enumerate(base)
    ]
    return MicroBatchCost(*phases)


def divided_cost(
    cost: MicroBatchCost, model: Model, policy: Policy, hardware: HardwareProfile, request: Request
) -> MicroBatchCost:
    """The same of a policy whose cpu attends, with what it adds to move what of the cache is in host memory."""
    at_site = replace(policy, attention=AttentionSite.COMPUTE, kv_moved=0.0)
    moved = _phases(_thin(model, at_site, request), at_site, hardware, request, {})
    phases = (cost.prefill, cost.decode, cost.prefill_once, cost.decode_once)
    return MicroBatchCost(
        *(
            replace(phase, by_share={**phase.by_share, MOVED: _difference(sums, phase.fixed)})
            for phase, sums in zip(phases, moved, strict=True)
        )
    )


def _thin(model: Model, policy: Policy, request: Request) -> tuple[Model, _Depth]:
    """A layer of every kind, and for how many each stands."""
    layers = LayerKinds.of(model, request)
    counts = Counter(unit.kind for unit in model.packed_for(policy).units)
    return model.shallow(layers.few), _Depth(layers, counts)


def _phases(
    thin: tuple[Model, _Depth], policy: Policy, hardware: HardwareProfile, request: Request, shares: Mapping[str, Tier]
) -> list[Seconds]:
    """Of a placement of all of each kind on one tier, as ``MicroBatchCost`` lists its phases. shares: of kinds that are
    not in host memory."""
    model, depth = thin
    placed = {kind: Placement.all_on(shares.get(kind, _BASE)) for kind in policy.placements}
    pure = replace(policy, num_gpu_batches=1, schedule=Schedule.BLOCK, **placed)  # type: ignore[arg-type]
    each, once = _sums(model, pure, hardware, request, depth, 0)
    if request.gen_len == 1:
        return [each, _NONE, once, _NONE]
    # A decode pass half-way.
    longer = replace(request, prompt_len=request.prompt_len + request.gen_len // 2)
    later, again = _sums(model, pure, hardware, longer, depth, 1)
    return [each, later, again, again]


def _difference(sums: Seconds, fixed: Seconds) -> Seconds:
    return {lane: sums.get(lane, 0.0) - fixed.get(lane, 0.0) for lane in {**fixed, **sums}}


def _sums(
    model: Model, policy: Policy, hardware: HardwareProfile, request: Request, depth: _Depth, number: int
) -> tuple[Seconds, Seconds]:
    """Per lane, the seconds of a micro-batch in the ``number``-th pass, and of what the pass pays once; each unit
    counts as often as the whole model has its like."""
    # The last pass of a job loads nothing, so what is looked at must not be the last.
    lasting = request if request.gen_len == 1 else replace(request, gen_len=3)
    requests = [lasting] * policy.gpu_batch_size
    plan = plan_job(model, policy, hardware, requests)
    cost = StepCost(plan)
    scheduler = Scheduler(policy, plan)
    own: defaultdict[Lane, float] = defaultdict(float)
    shared: defaultdict[Lane, float] = defaultdict(float)
    for each in range(number + 1):
        steps = scheduler.steps(scheduler.schedule())
        for step in steps:
            if each == number:
                times = depth.times(plan.job.units[step.unit])
                (shared if step.on_weights else own)[step.lane] += times * cost.seconds(step)
        scheduler.postprocess()
    return own, shared


def _sum(once: PhaseCost, each: PhaseCost, times: float) -> PhaseCost:
    def add(first: Seconds, second: Seconds) -> Seconds:
        return {lane: first.get(lane, 0.0) + times * second.get(lane, 0.0) for lane in {**first, **second}}

    shares = {share: add(once.by_share[share], each.by_share[share]) for share in once.by_share}
    return PhaseCost(add(once.fixed, each.fixed), shares)
