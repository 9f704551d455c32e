"""Batch shapes worth a look, and for each the placement that a linear program finds best.

What the program promises for a shape is a bound (nothing waits in it); shapes that cannot beat what others promise are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.tiers import Lane, Tier, link_of
from flexgen_bench.planner.batch_costs import MicroBatchCost, micro_batch_cost, thinned
from flexgen_bench.planner.cohorts import kv_token_bytes
from flexgen_bench.planner.memory_plan import plan_job
from flexgen_bench.planner.placement_lp import (
    KINDS,
    PhaseCost,
    PlacementProblem,
    PlacementSolution,
    least_work,
    on_resource,
    solve,
)
from flexgen_bench.planner.task import Task
from flexgen_bench.schedule.job import UnitKind

# Coarse: what lies between is found by changing the best of these.
BLOCKS = (1, 4, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
MICRO_BATCHES = (1, 4, 16, 32, 64, 128)
MOST_BATCHES = 32  # micro-batches of a block: more are never better than larger ones
WHOLE_PROMPTS = 16384  # prompt tokens of a micro-batch that may be computed at once
CHUNK = 4096  # otherwise, or to save workspace
# Layers are computed where they lie for few sequences only: then reading weights there beats moving them.
IN_PLACE_SEQUENCES = 32


@dataclass(frozen=True)
class Candidate:
    """A batch shape with its best placement. seconds: what the linear program promises for a block; tok_per_s follows from it."""

    policy: Policy
    problem: PlacementProblem
    solution: PlacementSolution
    tok_per_s: float


def batch_shapes(task: Task) -> Iterator[Policy]:
    """Policies without their placements."""
    accelerator = task.hardware.compute_tier is Tier.GPU
    sites = list(AttentionSite) if accelerator else [AttentionSite.COMPUTE]
    for block in _blocks(task.most):
        for micro_batch in _micro_batches(block):
            for chunk in _chunks(micro_batch * task.request.prompt_len):
                for site in sites:
                    for lossy in task.packed:
                        shape = Policy(
                            micro_batch, -(-block // micro_batch), attention=site,
                            prefill_chunk=chunk, lossy=lossy,
                        )  # fmt: skip
                        yield shape
                        if accelerator and block <= IN_PLACE_SEQUENCES:
                            yield replace(shape, offloaded=Offloaded.IN_PLACE)
                        if _can_be_continuous(task, block):
                            yield replace(shape, schedule=Schedule.CONTINUOUS)


def _blocks(most: int | None) -> list[int]:
    if most is None:
        return list(BLOCKS)
    # A job's blocks should be equally full.
    parts = {-(-most // n) for n in (1, 2, 3, 4, 6, 8, 12, 16, 32)}
    return sorted({1, *parts, *(b for b in BLOCKS if b <= most and most % b == 0)})


def _micro_batches(block: int) -> list[int]:
    found = [b for b in MICRO_BATCHES if b <= block <= b * MOST_BATCHES]
    return sorted({*found, *([block] if block <= MICRO_BATCHES[-1] else [])})


def _chunks(tokens: int) -> list[int | None]:
    whole: list[int | None] = [None] if tokens <= WHOLE_PROMPTS else []
    return whole + ([CHUNK] if tokens > CHUNK else [])


def _can_be_continuous(task: Task, block: int) -> bool:
    """It needs a sequence for every pass of a sequence's life, and more than one block of them."""
    jobs = task.prompts is None or task.prompts > block
    return jobs and 1 < task.request.gen_len <= block


class Candidates:
    """Solves the programs of a task's batch shapes, keeping what shapes have in common."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._costs: dict[Policy, MicroBatchCost] = {}
        self._rest: dict[Policy, dict[Tier, float]] = {}

    def best(self, of_a_kind: int) -> list[Candidate]:
        """The most promising batch shapes, best first: so many of each way of working (schedule, sites, compression), since what a way
        of working loses to waiting is not in the promise."""
        bounded = [
            (shape, self._problem(shape)) for shape in dict.fromkeys(batch_shapes(self.task))
        ]
        bounded.sort(key=lambda one: -self._bound(*one))
        found: dict[object, list[Candidate]] = {}
        for shape, problem in bounded:
            way = (shape.schedule, shape.attention, shape.offloaded, shape.lossy)
            # With and without the disk are two ways: what waiting for a disk costs is not in the promise, either.
            both = [found.setdefault((way, uses_disk), []) for uses_disk in (False, True)]
            if all(len(k) == of_a_kind for k in both):
                bound = self._bound(shape, problem)
                if all(bound <= known[-1].tok_per_s for known in both):
                    continue
            for candidate in self.solved(shape, problem):
                known = both[candidate.policy.lowest_tier is Tier.DISK]
                known.append(candidate)
                known.sort(key=lambda one: -one.tok_per_s)
                del known[of_a_kind:]
        every = [_patient(candidate) for known in found.values() for candidate in known]
        return sorted(every, key=lambda candidate: -candidate.tok_per_s)

    def solved(self, shape: Policy, problem: PlacementProblem | None = None) -> list[Candidate]:
        """The best placement of a batch shape: streaming what does not fit, or with weights (or all) held where they are used."""
        found = []
        for tried in self.problems(shape, problem):
            solution = solve(tried)
            if solution is not None:
                policy = solution.applied_to(shape)
                speed = shape.block_size * self.task.request.gen_len / solution.seconds
                found.append(Candidate(policy, tried, solution, speed))
        return sorted(found, key=lambda candidate: -candidate.tok_per_s)[:1]

    def problems(
        self, shape: Policy, problem: PlacementProblem | None = None
    ) -> Iterator[PlacementProblem]:
        """A shape's linear programs: one in which anything may be anywhere, others in which weights, or all, stay where they are used and
        no room for moving them is needed."""
        problem = problem or self._problem(shape)
        here = self.task.hardware.compute_tier
        for held in ((), ("weights",), KINDS):
            if sum(problem.sizes[kind] for kind in held) > self.task.capacity(here):
                break
            room = self._room(shape, held)
            if min(room.values()) >= 0:
                yield replace(problem, room=room, held=dict.fromkeys(held, here))

    def _problem(self, shape: Policy) -> PlacementProblem:
        task = self.task
        prefill, decode = self._cost(shape).of_block(shape.num_gpu_batches)
        return PlacementProblem(
            schedule=shape.schedule,
            prefill=prefill,
            decode=decode,
            decode_passes=task.request.gen_len - 1,
            sizes=self._sizes(shape),
            room={tier: task.capacity(tier) for tier in task.hardware.tiers},
            max_latency_s=task.max_latency_s,
        )

    def _cost(self, shape: Policy) -> MicroBatchCost:
        key = replace(shape, num_gpu_batches=1, schedule=Schedule.BLOCK)
        if key not in self._costs:
            task = self.task
            self._costs[key] = micro_batch_cost(
                task.shape, task.packed[shape.lossy], task.dtype, key, task.hardware, task.request
            )
        return self._costs[key]

    def _sizes(self, shape: Policy) -> dict[str, float]:
        task, request = self.task, self.task.request
        weights = sum(unit.home_bytes for unit in task.packed[shape.lossy].units)
        token = kv_token_bytes(task.shape, task.dtype, shape) * task.shape.num_layers
        cached = request.prompt_len + max(0, request.gen_len - 1) if request.gen_len > 1 else 0
        hidden = request.prompt_len * task.shape.hidden_size * task.dtype.bytes
        block = shape.block_size
        return {
            "weights": float(weights),
            "kv_cache": float(block * cached * token),
            "activations": float(block * hidden),
        }

    def _room(self, shape: Policy, held: tuple[str, ...]) -> dict[Tier, float]:
        """Bytes for what has shares: what the machine has, less staging and workspace, which a single layer's plan shows."""
        task, here = self.task, self.task.hardware.compute_tier
        below = task.hardware.tiers[task.hardware.tiers.index(here) + 1]
        placed = {kind: Placement.all_on(here if kind in held else below) for kind in KINDS}
        policy = replace(shape, **placed)  # type: ignore[arg-type]
        if policy not in self._rest:
            thin = thinned(task.shape, task.packed[shape.lossy], 1)
            requests = [task.request] * shape.block_size
            plan = plan_job(
                thin.shape, thin.packed, task.dtype, policy, task.hardware, requests,
                scored_rows=task.scored_rows,
            )  # fmt: skip
            layers = sum(unit.kind is UnitKind.LAYER for unit in plan.job.units)
            rest = {}
            for tier, parts in plan.bytes.items():
                tails = parts.get("kv tails", 0) * (task.shape.num_layers / layers - 1)
                rest[tier] = sum(b for n, b in parts.items() if n not in KINDS) + tails
            self._rest[policy] = rest
        return {t: task.capacity(t) - self._rest[policy].get(t, 0) for t in task.hardware.tiers}

    def _bound(self, shape: Policy, problem: PlacementProblem) -> float:
        """Tokens/s that no placement of this shape can beat: every link and processor at its least, whatever memory there is."""
        resources = tuple(dict.fromkeys(map(link_of, Lane)))  # lanes that share a link are one

        def least(phase: PhaseCost, resource: Lane) -> float:
            seconds = on_resource(phase.fixed, resource)
            for kind in KINDS:
                added = [
                    on_resource(s, resource) for (of, _), s in phase.by_share.items() if of == kind
                ]
                seconds += min(added)
            return seconds

        passes = problem.decode_passes
        prefill = [least(problem.prefill, one) for one in resources]
        decode = [passes * least(problem.decode, one) for one in resources]
        if shape.schedule is Schedule.BLOCK:
            seconds = max(prefill) + max(decode)
        else:
            seconds = max(a + b for a, b in zip(prefill, decode, strict=True))
        if problem.max_latency_s is not None and seconds > problem.max_latency_s:
            return 0.0
        return shape.block_size * self.task.request.gen_len / seconds


def _patient(candidate: Candidate) -> Candidate:
    """The candidate placed so that lanes that do not bind have the least to do."""
    solution = least_work(candidate.problem, candidate.solution)
    policy = solution.applied_to(candidate.policy)
    return replace(candidate, policy=policy, solution=solution)
