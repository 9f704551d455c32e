"""A job as the planner has it: what was asked, and what a policy for it may be chosen from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.job import Job
from flexgen_bench.core.pipeline import Stage
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.models.model import Model
from flexgen_bench.planner.forecast import Forecast
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.schedule.sequence_groups import Request

# Blocks of a job whose number of prompts is left open: more than one, so that a continuous schedule shows what it does,
# its slow start and end included.
OPEN_BLOCKS = 4


@dataclass(frozen=True)
class SearchSpace:
    """A job with the limits of its policy.

    lossies: the ways in which results may be changed: the search takes the fastest, a plain rule the first. available:
    bytes free per tier, where that is less than the machine has. block_size: the most sequences that may share a load
    of the weights; None: any number. scored_rows: rows of logits that a scoring job wants at once.

    ranks: that share the layers; a policy is then looked for with the machine, and ``layers`` of the model's layers, of
    one of them: the last, which has the head beside them. A wave of each rank is under way (``Scheduler``), so that as
    many blocks are.
    """

    job: Job
    lossies: tuple[Lossy, ...]
    available: Mapping[Tier, int] = field(default_factory=dict)
    block_size: int | None = None
    scored_rows: int = 0
    ranks: int = 1
    layers: int | None = None

    @cached_property
    def models(self) -> Mapping[Lossy, Model]:
        """The model, or as much of it as a rank has, with its weights packed for each of the ways."""
        job = self.job
        whole = ((lossy, Model.of(job.shape, job.dtype, lossy.weights)) for lossy in self.lossies)
        own = ((lossy, model if job.part is None else model.sliced(job.part)) for lossy, model in whole)
        return {lossy: model.shallow(self.num_layers) for lossy, model in own}

    @property
    def num_layers(self) -> int:
        """How many a policy is looked for with."""
        return self.job.shape.num_layers if self.layers is None else self.layers

    @property
    def wave_prompts(self) -> int | None:
        """The job's prompts, or of several ranks one wave's; None: as many as are in a block."""
        prompts = self.job.num_prompts
        return None if prompts is None else -(-prompts // self.ranks)

    @property
    def request(self) -> Request:
        """What every sequence asks for."""
        return Request(self.job.prompt_len, self.job.gen_len)

    @property
    def largest_block(self) -> int | None:
        """The most sequences there can be in a block; None: no limit but memory."""
        known = [x for x in (self.wave_prompts, self.block_size) if x is not None]
        return min(known) if known else None

    def count(self, policy: Policy) -> int:
        """Sequences of the whole job: of one of open length ``OPEN_BLOCKS`` blocks (of every wave)."""
        return self.job.num_prompts or OPEN_BLOCKS * self.under_way(policy)

    def under_way(self, policy: Policy) -> int:
        """Sequences that run at once: a block, of every wave."""
        return policy.block_size * self.ranks

    def total_s(self, times: Forecast) -> float:
        """Seconds of the job, going by the times of one rank: before the last one can begin, the others have passed
        on the first pass."""
        return times.total_s + (self.ranks - 1) * times.passes[0].seconds

    def plan(self, policy: Policy) -> MemoryPlan:
        """The job under a policy. Raises DoesNotFit."""
        plan = self.plan_of(self.models[policy.lossy], policy, self.count(policy))
        plan.check(self.available)
        return plan

    def plan_of(self, model: Model, policy: Policy, count: int) -> MemoryPlan:
        """So many of the requests to a model that may be a shallow one, whether they fit or not."""
        requests, scored = [self.request] * count, self.scored_rows
        stage = None if self.ranks == 1 else Stage(self.ranks - 1, self.ranks, 0, model.shape.num_layers)
        return plan_job(model, policy, self.job.hardware, requests, scored_rows=scored, stage=stage)

    def capacity(self, tier: Tier) -> float:
        """Bytes a plan may use on a tier."""
        limits = (self.job.hardware.capacity_bytes(tier), self.available.get(tier))
        known = [x for x in limits if x is not None]
        return float(min(known)) if known else 1e15


def permitted(lossy: Lossy) -> tuple[Lossy, ...]:
    """The ways of compressing that a permission covers, all of it first: both weights and KV cache, or one of them."""
    some = [lossy, replace(lossy, kv_cache=None), replace(lossy, weights=None, activations=None)]
    return tuple(dict.fromkeys(one for one in some if lossy.is_exact or not one.is_exact))
