"""What binds a policy, and what more of each memory and each link would bring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flexgen_bench.core.policy import Policy
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.core.units import GIB
from flexgen_bench.planner.candidates import Candidates
from flexgen_bench.planner.placement_lp import PhaseCost, PlacementProblem, solve
from flexgen_bench.planner.search_space import SearchSpace

MORE_LINK = 1.1
# A block may grow into more memory, by these factors.
_GROWTH = (1.0, 1.05, 1.1, 1.25, 1.5)
# Gains below this share are none: placements cannot be that fine.
_LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class Sensitivity:
    """binding: the limits at which the placement is, those first that cost most. more: tokens/s won by one GiB more of
    a tier or by 10 % more of a link or processor, by the linear programs' bounds, scaled to what was predicted."""

    binding: tuple[str, ...]
    more: Mapping[str, float]


def sensitivity(space: SearchSpace, policy: Policy, tok_per_s: float) -> Sensitivity:
    """Around a policy, with its way of working and its micro-batches."""
    candidates = Candidates(space)
    problems = _problems(candidates, space, policy)
    base = _best(problems)
    if base is None:
        return Sensitivity((), {})
    solution = solve(problems[0][1])
    tight = solution.tight if solution is not None else {}
    binding = sorted(tight, key=lambda name: -tight[name] * _amount(problems[0][1], name))
    more: dict[str, float] = {}
    for tier in space.job.hardware.tiers:
        wider = [(count, _roomier(p, tier)) for count, p in problems]
        more[f"1 GiB more of {tier} memory"] = _won(base, _best(wider)) * tok_per_s
    for resource in problems[0][1].resources:
        faster = [(count, _faster(p, resource)) for count, p in problems]
        more[f"10 % more of {resource}"] = _won(base, _best(faster)) * tok_per_s
    return Sensitivity(tuple(binding), {name: won for name, won in more.items() if won > 0})


def _problems(candidates: Candidates, space: SearchSpace, policy: Policy) -> list[tuple[int, PlacementProblem]]:
    """(sequences of a block, problem) for the policy's block and larger ones."""
    most = space.largest_block
    counts = {max(1, round(policy.num_gpu_batches * factor)) for factor in _GROWTH}
    problems = []
    for count in sorted({policy.num_gpu_batches, *counts}):
        shape = replace(policy, num_gpu_batches=count)
        if count == policy.num_gpu_batches or most is None or shape.block_size <= most:
            problems += [(shape.block_size, p) for p in candidates.problems(shape)]
    return sorted(problems, key=lambda one: one[0] != policy.block_size)


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
