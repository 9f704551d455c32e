"""A policy for several ranks, and the plans of each.

Ranks are alike, but for their layers, and all run the same policy. So it is looked for on one of them (``SearchSpace``:
the last rank's part, with its share of the machine), as if hidden states were there when it wants them: that is how
fast a pipeline is whose ranks all have work. Then all ranks are planned and simulated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.core.job import Job
from flexgen_bench.core.pipeline import Stage, stages_of
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
    """The ranks of a job. available: bytes free for a plan on each of them, where that is less than its machine has."""

    job: Job
    machines: tuple[RankMachine, ...]
    lossies: tuple[Lossy, ...]
    available: Mapping[Tier, int] = field(default_factory=dict)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """As the profile says how many layers each has, else as suits the machines."""
        stated = self.job.hardware.layers_per_rank
        if stated is not None and len(stated) == len(self.machines):
            return stages_of(stated, self.job.shape.num_layers)
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
    choices = [_found(ranks, ranks.space(rank)) for rank in _kinds(ranks)]
    return max(choices, key=lambda one: _speed(ranks, one))


def _found(ranks: Ranks, space: SearchSpace) -> RankChoice:
    """What a search comes to, in as large blocks as fit all ranks: whole layers and sequences may take more on
    another."""
    auto = auto_choice(space)
    policy: Policy | None = auto.choice.policy
    while policy is not None:
        try:
            return RankChoice(policy, ranks.forecast(policy, space.count(policy)), space, auto)
        except DoesNotFit as error:
            policy, refusal = _smaller(policy), error
    raise refusal


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
    kinds: list[int] = []
    for rank in sorted(range(len(ranks.machines)), key=lambda one: -len(ranks.stages[one].layers)):
        if all(ranks.machines[rank].hardware != ranks.machines[other].hardware for other in kinds):
            kinds.append(rank)
    return kinds
