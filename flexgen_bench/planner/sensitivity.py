"""What binds a policy, and what more of each memory and each link would bring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flexgen_bench.core.policy import Policy
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.core.units import GIB
from flexgen_bench.planner.candidates import Candidates
from flexgen_bench.planner.placement_lp import PhaseCost, PlacementProblem, solve
from flexgen_bench.planner.task import Task

MORE_LINK = 1.1
# A block may grow into more memory, by these factors.
_GROWTH = (1.0, 1.05, 1.1, 1.25, 1.5)
# Gains below this share are none: placements cannot be that fine.
_LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class Gains:
    """binding: the limits at which the placement is, those first that cost most. more: tokens/s won by one GiB more of
    a tier or by 10 % more of a link or processor, as the linear programs promise it, scaled to what was predicted."""

    binding: tuple[str, ...]
    more: Mapping[str, float]


def gains(task: Task, policy: Policy, tok_per_s: float) -> Gains:
    """Around a policy, with its way of working and its micro-batches."""
    candidates = Candidates(task)
    problems = _problems(candidates, task, policy)
    base = _best(problems)
    if base is None:
        return Gains((), {})
    solution = solve(problems[0][1])
    tight = solution.tight if solution is not None else {}
    binding = sorted(tight, key=lambda name: -tight[name] * _amount(problems[0][1], name))
    more: dict[str, float] = {}
    for tier in task.hardware.tiers:
        wider = [(count, _roomier(p, tier)) for count, p in problems]
        more[f"1 GiB more of {tier} memory"] = _won(base, _best(wider)) * tok_per_s
    for resource in problems[0][1].resources:
        faster = [(count, _faster(p, resource)) for count, p in problems]
        more[f"10 % more of {resource}"] = _won(base, _best(faster)) * tok_per_s
    return Gains(tuple(binding), {name: won for name, won in more.items() if won > 0})


def _problems(candidates: Candidates, task: Task, policy: Policy) -> list[tuple[int, PlacementProblem]]:
    """(sequences of a block, problem) for the policy's block and larger ones."""
    counts = {max(1, round(policy.num_gpu_batches * factor)) for factor in _GROWTH}
    found = []
    for count in sorted({policy.num_gpu_batches, *counts}):
        shape = replace(policy, num_gpu_batches=count)
        if count == policy.num_gpu_batches or task.most is None or shape.block_size <= task.most:
            found += [(shape.block_size, p) for p in candidates.problems(shape)]
    return sorted(found, key=lambda one: one[0] != policy.block_size)


def _best(problems: list[tuple[int, PlacementProblem]]) -> float | None:
    """Sequences per second."""
    solved = [(count, solve(problem)) for count, problem in problems]
    return max((count / s.seconds for count, s in solved if s is not None), default=None)


def _won(base: float, other: float | None) -> float:
    won = (other or base) / base - 1
    return won if won > _LEAST_GAIN else 0.0


def _roomier(problem: PlacementProblem, tier: Tier) -> PlacementProblem:
    return replace(problem, room={**problem.room, tier: problem.room[tier] + GIB})


def _faster(problem: PlacementProblem, resource: Lane) -> PlacementProblem:
    """Every lane that works on the link (or processor) gets more of it."""

    def scaled(phase: PhaseCost) -> PhaseCost:
        def of(seconds: Mapping[Lane, float]) -> dict[Lane, float]:
            return {lane: s / MORE_LINK if lane.link is resource else s for lane, s in seconds.items()}

        return PhaseCost(of(phase.fixed), {share: of(s) for share, s in phase.by_share.items()})

    return replace(problem, prefill=scaled(problem.prefill), decode=scaled(problem.decode))


def _amount(problem: PlacementProblem, name: str) -> float:
    """What a limit's unit is to be counted in: a percent of the memory, a second of a lane."""
    for tier, room in problem.room.items():
        if name == f"memory of {tier}":
            return room / 100
    return 1.0
