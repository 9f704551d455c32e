"""How fast a policy is, for a search that compares hundreds: each simulated once, deep models by a few layers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.core.policy import AttentionSite, Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.models.model import Model
from flexgen_bench.models.packing import PackedModel
from flexgen_bench.planner.forecast import Forecast, forecast
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.planner.pass_kinds import POINTS as POINTS_OF_A_CHOICE
from flexgen_bench.planner.planned_units import unit_tiers
from flexgen_bench.planner.search_space import SearchSpace
from flexgen_bench.planner.why import Alternative, busy_shares, way_of_working
from flexgen_bench.schedule.passes import chunk_len
from flexgen_bench.schedule.scheduled_job import UnitKind

# A deeper model is judged by so many of its layers: they are alike. More, up to twice as many, where a tier would have
# another share of them than it has of all: what is read from it is off by at most this part, or as little as that many
# layers allow.
THIN_LAYERS = 12
SHARE_ERROR = 0.05
POINTS = 3  # passes of a kind that are simulated while policies are compared
# A policy is simulated on all layers if that takes no more steps than this.
FULL_STEPS = 60_000

_BELOW = (Tier.CPU, Tier.DISK)  # what is read from them takes time


class Evaluator:
    """Tokens per second of the policies of one space. steps: simulated so far, to compare policies."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.steps = 0
        self._known: dict[Policy, Forecast | None] = {}  # None: does not fit
        self._simulated: dict[object, Forecast] = {}  # by what runs: many policies come to the same
        self._in_full: dict[Policy, Forecast] = {}

    @property
    def is_deep(self) -> bool:
        """Whether the model has too many layers to simulate all of them for every policy."""
        return self.space.num_layers > 2 * THIN_LAYERS

    @property
    def tried(self) -> int:
        """Policies that were simulated, those that come to the same once."""
        return len(self._simulated)

    def tok_per_s(self, policy: Policy) -> float:
        """On simulated lanes; 0 for what does not fit or takes too long."""
        times = self._forecast(policy)
        return 0.0 if times is None else self._speed(policy, times)

    def full_tok_per_s(self, policy: Policy) -> float:
        """The same, on all layers where that does not take too long."""
        return self._speed(policy, self._full(policy)) if self._forecast(policy) else 0.0

    def fits(self, policy: Policy) -> bool:
        """Whether there is room for it, however long it takes."""
        return self._forecast(policy) is not None

    def of_choice(self, policy: Policy) -> Forecast:
        """Of the policy chosen, which fits: with as many passes of every kind as a given policy's forecast has."""
        times = self._full(policy)
        return times if self._is_long(times) else forecast(self.space.plan(policy), points=POINTS_OF_A_CHOICE)

    def alternative(self, chosen: Policy) -> Alternative | None:
        """The fastest of what was simulated that works in another way and is no faster."""
        mine, most, times = way_of_working(chosen), self.tok_per_s(chosen), self._forecast(chosen)
        others = [
            policy
            for policy, its in self._known.items()
            if its is not times and way_of_working(policy) != mine and 0 < self.tok_per_s(policy) <= most
        ]
        best = max(others, key=self.tok_per_s, default=None)
        if best is None:
            return None
        times = self._forecast(best)
        assert times is not None, "it has a speed"
        return Alternative(best, self.tok_per_s(best) / most, busy_shares(times, self.space.job.hardware))

    def _forecast(self, policy: Policy) -> Forecast | None:
        """Once, however often it is asked about."""
        if policy not in self._known:
            try:
                plan = self.space.plan(policy)
            except DoesNotFit:
                self._known[policy] = None
            else:
                self._known[policy] = self._times(plan)
        return self._known[policy]

    def _full(self, policy: Policy) -> Forecast:
        """Of a policy that fits. On all layers it does not count as a try."""
        times = self._forecast(policy)
        assert times is not None, "what is chosen fits"
        if self._is_long(times):
            return times
        if policy not in self._in_full:
            self._in_full[policy] = forecast(self.space.plan(policy), points=POINTS)
        return self._in_full[policy]

    def _is_long(self, times: Forecast) -> bool:
        """Whether a policy takes too many steps to be simulated on all layers, going by what was simulated of it."""
        return times.steps * self.space.num_layers >= FULL_STEPS * THIN_LAYERS

    def _speed(self, policy: Policy, times: Forecast) -> float:
        count, latest = self.space.count(policy), self.space.job.max_latency_s
        blocks, total_s = max(1.0, count / self.space.under_way(policy)), self.space.total_s(times)
        if latest is not None and total_s / blocks > latest:
            return 0.0
        return count * self.space.job.gen_len / total_s

    def _times(self, plan: MemoryPlan) -> Forecast:
        """Of the whole job; of a deep model, from a shallow one."""
        policy, few = plan.policy, self._like_all(plan) if self.is_deep else None
        if few is not None:
            plan = self.space.plan_of(plan.model.shallow(few), policy, self.space.count(policy))
        runs = few, what_runs(plan)
        if runs not in self._simulated:
            times = forecast(plan, points=POINTS)
            self.steps += times.steps
            if few is not None:
                times = times.deeper(self.space.num_layers / few, policy.overlap)
            self._simulated[runs] = times
        return self._simulated[runs]

    def _like_all(self, plan: MemoryPlan) -> int:
        """How many layers lie on the tiers, and are rings, as all of them do, nearly. All, if a tier that has some
        would have none of fewer: one layer of many on disk would cost nothing."""
        policy, least = plan.policy, 1 / plan.model.shape.num_layers
        rings = [unit.ring for unit in plan.job.units if unit.kind is UnitKind.LAYER]

        def shares_of(model: Model, rings: Sequence[int | None]) -> Mapping[_Part, float]:
            return _shares(model.packed_for(policy), policy, rings)

        all_of_them = shares_of(plan.model, rings)
        below = [part for part in all_of_them if not isinstance(part, tuple) or part[1] in _BELOW]

        def error(few: int) -> float:
            shares = shares_of(plan.model.shallow(few), rings[:few])
            errors = [abs(shares[part] - all_of_them[part]) / (all_of_them[part] or least) for part in below]
            return max(errors)

        best = THIN_LAYERS
        for few in range(THIN_LAYERS, 2 * THIN_LAYERS + 1):
            if error(few) <= SHARE_ERROR:
                return few
            best = min(best, few, key=error)
        shares = shares_of(plan.model.shallow(best), rings[:best])
        if any(all_of_them[key] and not shares[key] for key in below):
            return plan.model.shape.num_layers
        return best


def what_runs(plan: MemoryPlan) -> object:
    """Equal for plans of like requests to a model whose passes are the same, whatever their policies say: shares may
    come to the same whole layers and sequences, and choices may be about what there is nothing of."""
    job, groups, policy = plan.job, plan.groups, plan.policy
    if not any(span.is_delegated for kv_slot in groups.kv_slots for span in kv_slot.kv):
        job = replace(job, attention=AttentionSite.COMPUTE)
    if not job.buffers:
        job = replace(job, weight_buffers=0)
    chunk = chunk_len(policy, max(kv_slot.size for kv_slot in groups.kv_slots))
    is_chunked = chunk is not None and chunk < groups.requests[0].prompt_len
    passes = policy.schedule, policy.gpu_batch_size, policy.prefill_chunk if is_chunked else None, policy.overlap
    return job, groups.kv_slots, len(groups.requests), len(groups.members), passes, policy.lossy


# What has a share of the layers: those of a kind of unit on a tier, or the rings of a window.
_Part = tuple[UnitKind, Tier] | int


def _shares(packed: PackedModel, policy: Policy, rings: Sequence[int | None]) -> Mapping[_Part, float]:
    """Of the layers, and of their experts where these are placed apart, on each tier; of layers, the rings of each
    window."""
    places = Counter((unit.kind, tier) for unit, tier in zip(packed.units, unit_tiers(packed, policy), strict=True))
    depth = Counter(unit.kind for unit in packed.units if unit.kind.repeats)
    shares: defaultdict[_Part, float] = defaultdict(float)
    shares.update({(kind, tier): places[kind, tier] / depth[kind] for kind in depth for tier in Tier})
    shares.update({ring: rings.count(ring) / len(rings) for ring in rings if ring is not None})
    return shares
