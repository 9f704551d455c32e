"""What a policy is searched for: a job on a machine, and what may be chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.models.packing import PackedModel
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.schedule.sequence_groups import Request

# Blocks of a job whose number of prompts is left open: more than one, so that a continuous schedule shows what it does,
# its slow start and end included.
OPEN_BLOCKS = 4


@dataclass(frozen=True)
class Task:
    """A job of like requests.

    packed: the weights' layout, for each of the ways in which results may be changed: the search takes the fastest.
    prompts: how many;
    None: ``OPEN_BLOCKS`` blocks, whatever the policy's block is. available: bytes free per tier, where that is less
    than the machine has.
    block: the most sequences that may share a load of the weights. max_latency_s: of a block, from its start to its
    last token.
    scored_rows: rows of logits that a scoring job wants at once.
    """

    shape: ModelShape
    dtype: DType
    hardware: HardwareProfile
    packed: Mapping[Lossy, PackedModel]
    request: Request
    prompts: int | None = None
    available: Mapping[Tier, int] = field(default_factory=dict)
    block: int | None = None
    max_latency_s: float | None = None
    scored_rows: int = 0

    @property
    def most(self) -> int | None:
        """The largest block there can be; None: no limit but memory."""
        known = [x for x in (self.prompts, self.block) if x is not None]
        return min(known) if known else None

    def count(self, policy: Policy) -> int:
        """Sequences of the whole job."""
        return self.prompts or OPEN_BLOCKS * policy.block_size

    def plan(self, policy: Policy) -> MemoryPlan:
        """The job under a policy. Raises DoesNotFit."""
        requests = [self.request] * self.count(policy)
        plan = plan_job(
            self.shape,
            self.packed[policy.lossy],
            self.dtype,
            policy,
            self.hardware,
            requests,
            scored_rows=self.scored_rows,
        )
        plan.check(self.hardware, self.available)
        return plan

    def capacity(self, tier: Tier) -> float:
        """Bytes a plan may use on a tier."""
        limits = (self.hardware.capacity_bytes(tier), self.available.get(tier))
        known = [x for x in limits if x is not None]
        return float(min(known)) if known else 1e15
