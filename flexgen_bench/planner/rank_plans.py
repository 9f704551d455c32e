"""A policy for several ranks, and the plans of each.

Ranks are alike, but for their layers, and all run the same policy. So it is looked for on one of them (``SearchSpace``:
the last rank's part, with its share of the machine), as if hidden states were there when it wants them: that is how
fast a pipeline is whose ranks all have work. Then all ranks are planned and simulated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.core.job import Job
from flexgen_bench.core.pipeline import Stage
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.models.model import Model
from flexgen_bench.planner.auto_policy import AutoChoice, auto_choice
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.planner.rank_forecast import RankForecast, rank_forecast
from flexgen_bench.planner.rank_machines import RankMachine, searched_on
from flexgen_bench.planner.rank_stages import divided
from flexgen_bench.planner.search_space import SearchSpace
from flexgen_bench.schedule.sequence_groups import Request

_SMALLER = 0.9  # of a block that does not fit all ranks, what is tried next


@dataclass(frozen=True)
class Ranks:
    """The ranks of a job. available: bytes free for a plan on each of them, where that is less than its machine has.
    layers: of each rank; None: as suits the machines."""

    job: Job
    machines: tuple[RankMachine, ...]
    lossies: tuple[Lossy, ...]
    available: Mapping[Tier, int] = field(default_factory=dict)
    layers: tuple[Stage, ...] | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        if self.layers is not None:
            return self.layers
        model = Model.of(self.job.shape, self.job.dtype, self.lossies[0].weights)
        return divided(model, self.machines, Request(self.job.prompt_len, self.job.gen_len))

    def space(self, rank: int) -> SearchSpace:
        """What a policy is looked for in, with the machine of a rank, and as many layers."""
        stage = self.stages[rank]
        hardware = searched_on(self.machines[rank], self.machines)
        job = replace(self.job, hardware=hardware, num_gpus=1)
        return SearchSpace(job, self.lossies, self.available, ranks=stage.ranks, layers=len(stage.layers))

    def plans(self, policy: Policy, prompts: int) -> tuple[MemoryPlan, ...]:
        """Of every rank. DoesNotFit, of the first rank that has no room."""
        job = self.job
        model = Model.of(job.shape, job.dtype, policy.lossy.weights)
        requests = [Request(job.prompt_len, job.gen_len)] * prompts
        plans = []
        for stage, machine in zip(self.stages, self.machines, strict=True):
            plan = plan_job(model, policy, machine.hardware, requests, stage=stage)
            plan.check(self.available)
            plans.append(plan)
        return tuple(plans)

    def forecast(self, policy: Policy, prompts: int) -> RankForecast:
        """Of all ranks. DoesNotFit."""
        return rank_forecast(self.plans(policy, prompts), self.machines)


@dataclass(frozen=True)
class RankChoice:
    """forecast: of all ranks under the policy; space, auto: of the search on the part of one rank."""

    policy: Policy
    forecast: RankForecast
    space: SearchSpace
    auto: AutoChoice


def choose_for_ranks(ranks: Ranks) -> RankChoice:
    """The policy under which all ranks together are fastest, of those that are found for each kind of them. Raises
    DoesNotFit if there is none, and UserError if nothing keeps to the job's latency."""
    choices = [choice for rank in _kinds(ranks) for choice in _found(ranks, ranks.space(rank))]
    return max(choices, key=lambda one: _speed(ranks, one))


def _found(ranks: Ranks, space: SearchSpace) -> Iterator[RankChoice]:
    """The policies worth a simulation of all ranks: what is run after a search, and what is best of it."""
    auto = auto_choice(space)
    policy = fitting = auto.choice.policy
    while True:
        try:
            forecast = ranks.forecast(fitting, space.count(fitting))
        except DoesNotFit:
            smaller = _smaller(fitting)
            if smaller is None:
                raise
            fitting = smaller
        else:
            yield RankChoice(fitting, forecast, space, auto if fitting is policy else replace(auto, gain=None))
            return


def _smaller(policy: Policy) -> Policy | None:
    """With fewer sequences at once."""
    if policy.num_gpu_batches > 1:
        return replace(policy, num_gpu_batches=int(policy.num_gpu_batches * _SMALLER))
    if policy.gpu_batch_size > 1:
        return replace(policy, gpu_batch_size=int(policy.gpu_batch_size * _SMALLER))
    return None


def _speed(ranks: Ranks, choice: RankChoice) -> float:
    return choice.space.count(choice.policy) * ranks.job.gen_len / choice.forecast.total_s


def _kinds(ranks: Ranks) -> Sequence[int]:
    """A rank of every kind of machine: the one with the most layers."""
    most: dict[RankMachine | object, int] = {}
    for rank, machine in enumerate(ranks.machines):
        key = repr(machine.hardware)
        if key not in most or len(ranks.stages[rank].layers) > len(ranks.stages[most[key]].layers):
            most[key] = rank
    return list(most.values())
