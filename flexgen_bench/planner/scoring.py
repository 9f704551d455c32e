"""Scoring jobs: requests laid out in prefix trees, each of which is computed as one prompt of a job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.core.policy import Policy, Schedule
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.schedule.prefix_tree import PrefixTree, ScoreRequest, grow
from flexgen_bench.schedule.sequence_groups import Request

# Rows computed together: more make matrix products no faster, and results come later (docs/notes/accuracy_scoring.md).
TREE_ROWS = 1024
# Rows of logits held at once; more would only take memory.
LOGIT_ROWS = 256


class Planner(Protocol):
    """Plans a job of one machine and model."""

    def __call__(
        self, policy: Policy, requests: Sequence[Request], logits_row_bytes: int = 8, scored_rows: int = 0
    ) -> MemoryPlan: ...


@dataclass(frozen=True)
class ScoringPlan:
    """Prefix trees, the policy's variant for them, and its plan."""

    trees: Sequence[PrefixTree]
    policy: Policy
    plan: MemoryPlan


def lay_out(
    plan: Planner, check: Callable[[MemoryPlan], None], policy: Policy, requests: Sequence[ScoreRequest]
) -> ScoringPlan:
    """Prefix trees as large as is useful, or as memory allows. Raises the DoesNotFit of the smallest."""
    rows = TREE_ROWS
    longest = max(len(request.tokens) - 1 for request in requests)
    while True:
        scoring = plan_scoring(plan, policy, grow(requests, rows), LOGIT_ROWS, requests=len(requests))
        try:
            check(scoring.plan)
        except DoesNotFit:
            if rows <= longest:
                raise
            rows = max(rows // 2, longest)
            continue
        return scoring


def plan_scoring(
    plan: Planner,
    policy: Policy,
    trees: Sequence[PrefixTree],
    logit_rows: int,
    logits_row_bytes: int = 8,
    requests: int | None = None,
) -> ScoringPlan:
    """A prefix tree is a micro-batch, and a block is as many prefix trees as hold ``policy.block_size`` of the
    requests. Where nothing is streamed there is nothing to share, and results come earlier if each prefix tree is a
    block."""
    requests = requests or len(trees)
    prompts = [Request(tree.rows, 1) for tree in trees]
    single = replace(policy, gpu_batch_size=1, num_gpu_batches=1, schedule=Schedule.BLOCK)
    memory = plan(single, prompts, logits_row_bytes, logit_rows)
    if memory.job.streamed:
        block = max(1, round(policy.block_size * len(trees) / requests))
        if block > 1:
            single = replace(single, num_gpu_batches=min(block, len(trees)))
            memory = plan(single, prompts, logits_row_bytes, logit_rows)
    return ScoringPlan(trees, single, memory)


def typical(requests: Sequence[ScoreRequest]) -> list[Request]:
    """Requests as a policy is chosen for them: prefix trees mix them, so each counts with their mean length."""
    rows = sum(len(request.tokens) - 1 for request in requests)
    return [Request(-(-rows // len(requests)), 1)] * len(requests)
