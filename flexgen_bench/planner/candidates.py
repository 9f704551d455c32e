"""Batch shapes worth a look, and for each the placement that a linear program finds best.

The program's optimum is a bound on a shape (nothing waits in it); shapes that cannot beat the bounds of others are left
out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.core.policy import AttentionSite, ExpertLoads, Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.tiers import Lane, Site, Tier
from flexgen_bench.planner.batch_costs import MicroBatchCost, divided_cost, micro_batch_cost
from flexgen_bench.planner.placement_lp import (
    PhaseCost,
    PlacementProblem,
    PlacementSolution,
    least_work,
    on_resource,
    solve,
)
from flexgen_bench.planner.rings import LayerKinds
from flexgen_bench.planner.search_space import SearchSpace
from flexgen_bench.schedule.scheduled_job import UnitKind
from flexgen_bench.schedule.sequence_groups import kv_token_bytes

# Coarse: what lies between is found by changing the best of these.
BLOCKS = (1, 4, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
MICRO_BATCHES = (1, 4, 16, 32, 64, 128)
MOST_BATCHES = 32  # micro-batches of a block: more are never better than larger ones
WHOLE_PROMPTS = 16384  # prompt tokens of a micro-batch that may be computed at once
CHUNK = 4096  # otherwise, or to save workspace
# Bounds that are the same: what a program leaves out is more than this.
SAME = 0.98
DISK_GAIN = 0.999  # of a bound with the disk: what is had without it makes it useless
_MUCH = 0.8  # of a bound: what must be left of it once the policy fits
_TRIES = 10  # of making room for what whole layers and sequences take
# ``kv_moved`` of a shape whose cache may be divided, whatever part of it is moved.
DIVIDED = 0.5
# Layers are computed where they lie for few sequences only: then reading weights there beats moving them.
# Of a mixture, as many for each expert that a token could go to for one it goes to.
IN_PLACE_SEQUENCES = 32
# The same for loading only touched experts: 2 touch 86 % of them.
FEW_FOR_EXPERTS = 2


@dataclass(frozen=True)
class Candidate:
    """A batch shape with its best placement. bound: tokens/s, of the linear program's seconds for a block."""

    policy: Policy
    problem: PlacementProblem
    solution: PlacementSolution
    bound: float

    @property
    def uses_disk(self) -> bool:
        return self.policy.lowest_tier is Tier.DISK


def batch_shapes(space: SearchSpace) -> Iterator[Policy]:
    """Policies without their placements."""
    accelerator = space.job.hardware.compute_tier is Tier.GPU
    sites = list(AttentionSite) if accelerator else [AttentionSite.COMPUTE]
    idle = space.models[space.lossies[0]].experts_for_one
    experts = Placement(cpu=1) if idle > 1 else None  # a mixture's are always placed apart: it costs a step
    for block in _blocks(space.largest_block):
        for micro_batch in _micro_batches(block):
            for chunk in _chunks(micro_batch * space.job.prompt_len):
                for site in sites:
                    for lossy in space.lossies:
                        shape = Policy(
                            micro_batch,
                            -(-block // micro_batch),
                            attention=site,
                            prefill_chunk=chunk,
                            lossy=lossy,
                            experts=experts,
                        )
                        yield shape
                        if accelerator and block <= idle * IN_PLACE_SEQUENCES:
                            yield replace(shape, offloaded=Offloaded.IN_PLACE)
                        if experts is not None and block <= idle * FEW_FOR_EXPERTS:
                            yield replace(shape, expert_loads=ExpertLoads.TOUCHED)
                        if _can_be_continuous(space, block):
                            yield replace(shape, schedule=Schedule.CONTINUOUS)


def _blocks(most: int | None) -> list[int]:
    if most is None:
        return list(BLOCKS)
    # A job's blocks should be equally full.
    parts = {-(-most // n) for n in (1, 2, 3, 4, 6, 8, 12, 16, 32)}
    return sorted({1, *parts, *(b for b in BLOCKS if b <= most and most % b == 0)})


def _micro_batches(block: int) -> list[int]:
    usual = [b for b in MICRO_BATCHES if b <= block <= b * MOST_BATCHES]
    return sorted({*usual, *([block] if block <= MICRO_BATCHES[-1] else [])})


def _chunks(tokens: int) -> list[int | None]:
    whole: list[int | None] = [None] if tokens <= WHOLE_PROMPTS else []
    return whole + ([CHUNK] if tokens > CHUNK else [])


def _can_be_continuous(space: SearchSpace, block: int) -> bool:
    """It needs a sequence for every pass of a sequence's life, and more than one block of them."""
    prompts = space.wave_prompts
    longer = prompts is None or prompts > block
    return longer and 1 < space.job.gen_len <= block


class Candidates:
    """Solves the programs of a job's batch shapes, keeping what shapes have in common."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self._costs: dict[Policy, MicroBatchCost] = {}
        self._rest: dict[Policy, dict[Tier, float]] = {}

    def ways(self, of_a_kind: int, watch: Callable[[float], None] = lambda share: None) -> list[list[Candidate]]:
        """The batch shapes of the highest bounds, so many of each way of working: schedule, sites, compression, slots,
        with and without the disk. What a way loses to waiting is not in its bound, so none is left out for the bounds
        of others. Each list is in order of bound.
        watch: gets the share of the shapes that have been looked at."""
        problems = [(shape, self._problem(shape)) for shape in dict.fromkeys(batch_shapes(self.space))]
        bounded = [(self._bound(*one), *one) for one in problems]
        bounded.sort(key=lambda one: -one[0])
        by_way: dict[object, list[Candidate]] = {}
        for number, (bound, shape, problem) in enumerate(bounded):
            watch(number / len(bounded))
            both = [by_way.setdefault(_way(shape, disk), []) for disk in (False, True)]
            if all(len(k) == of_a_kind and bound < SAME * k[-1].bound for k in both):
                continue
            # Where two staging buffers have no room, one may; elsewhere that is tried with what turns out best.
            for candidate in self.solved(shape, problem) or self.solved(replace(shape, prefetch=1)):
                known = by_way.setdefault(_way(candidate.policy, candidate.uses_disk), [])
                known.append(candidate)
                known.sort(key=_rank)
                del known[of_a_kind:]
        return [known for known in by_way.values() if known]

    def divided(
        self, like: Policy, least: float, watch: Callable[[float], None] = lambda share: None
    ) -> list[Candidate]:
        """Of batch shapes whose cache may be divided, beside the one of a policy and compressed like that: those whose
        bounds are above ``least``, best first. watch: as in ``ways``."""
        others = (shape for shape in batch_shapes(self.space) if shape.lossy == like.lossy)
        shapes = (
            replace(shape, attention=AttentionSite.CPU, kv_moved=DIVIDED)
            for shape in (like, *others)
            if shape.offloaded is Offloaded.MOVE and shape.expert_loads is ExpertLoads.ALL
        )
        found: list[Candidate] = []
        different = list(dict.fromkeys(shapes))
        for number, shape in enumerate(different):
            watch(number / len(different))
            problem = self._problem(shape)
            if self._bound(shape, problem) > least:
                found += self.solved(shape, problem)
        return sorted((one for one in found if one.policy.kv_moved and one.bound > least), key=_rank)

    def fitted(self, candidate: Candidate) -> Candidate | None:
        """The candidate placed so that lanes that do not bind have the least to do; where whole layers and sequences
        take more than shares, in so much less room, or with a single staging buffer if that costs less. None if it does
        not fit."""
        fitted = self._fitted(candidate)
        kept = 0.0 if fitted is None else fitted.bound
        if candidate.policy.prefetch > 1 and kept < _MUCH * candidate.bound:
            with_one_buffer = map(self._fitted, self.solved(replace(candidate.policy, prefetch=1)))
            fitted = max(filter(None, [fitted, *with_one_buffer]), key=lambda one: one.bound, default=None)
        return fitted

    def _fitted(self, candidate: Candidate) -> Candidate | None:
        problem, shape = candidate.problem, candidate.policy
        solution: PlacementSolution | None = candidate.solution
        # A little less room may not cost a whole layer or sequence yet: of the same tier, twice as much is taken every
        # time.
        more = dict.fromkeys(problem.room, 1.02)
        for _ in range(_TRIES):
            if solution is None:
                return None
            policy = least_work(problem, solution).applied_to(shape)
            try:
                self.space.plan(policy)
            except DoesNotFit as error:
                room, tier = dict(problem.room), Site.parse(error.tier).tier
                less = more[tier] * (error.need_bytes - error.capacity_bytes)
                # What is short may be staging that a first share brings along: with none of it there, it may fit.
                room[tier] = max(0.0, room[tier] - less) if room[tier] else -less
                more[tier] *= 2
                problem = replace(problem, room=room)
                solution = solve(problem)
            else:
                return Candidate(policy, problem, solution, self._speed(shape, solution))
        return None

    def solved(self, shape: Policy, problem: PlacementProblem | None = None) -> list[Candidate]:
        """The best placement of a batch shape: streaming what does not fit, or with weights (or all) held where they
        are used. Where that uses the disk, the best without it, too; alone if the disk brings nothing."""
        free = self._best_of(shape, self.problems(shape, problem))
        if free is None or not free.uses_disk:
            return [free] if free is not None else []
        without = (replace(tried, room={**tried.room, Tier.DISK: 0.0}) for tried in self.problems(shape, problem))
        bare = self._best_of(shape, without)
        if bare is None:
            return [free]
        return [bare] if bare.bound > DISK_GAIN * free.bound else [free, bare]

    def _best_of(self, shape: Policy, problems: Iterable[PlacementProblem]) -> Candidate | None:
        solved = []
        for tried in problems:
            solution = solve(tried)
            if solution is not None:
                policy = solution.applied_to(shape)
                solved.append(Candidate(policy, tried, solution, self._speed(shape, solution)))
        return max(solved, key=lambda candidate: candidate.bound, default=None)

    def _speed(self, shape: Policy, solution: PlacementSolution) -> float:
        return shape.block_size * self.space.job.gen_len / solution.seconds

    def problems(self, shape: Policy, problem: PlacementProblem | None = None) -> Iterator[PlacementProblem]:
        """A shape's linear programs: one in which anything may be anywhere, others in which weights, or all, stay where
        they are used and no room for moving them is needed."""
        problem = problem or self._problem(shape)
        here = self.space.job.hardware.compute_tier
        kinds = problem.kinds
        for held in dict.fromkeys(((), ("weights",), tuple(k for k in kinds if k in ("weights", "experts")), kinds)):
            if sum(problem.sizes[kind] for kind in held) > self.space.capacity(here):
                break
            room = self._room(shape, held)
            if min(room.values()) >= 0:
                yield replace(problem, room=room, held=dict.fromkeys(held, here))

    def with_hidden_kept(self, shape: Policy) -> Candidate | None:
        """The best placement that fits of those that keep hidden states where they are used."""
        kept = {"activations": self.space.job.hardware.compute_tier}
        room = self._room(shape, tuple(kept))
        if min(room.values()) < 0:
            return None
        solved = self._best_of(shape, [replace(self._problem(shape), room=room, held=kept)])
        return None if solved is None else self.fitted(solved)

    def _problem(self, shape: Policy) -> PlacementProblem:
        space, job = self.space, self.space.job
        prefill, decode = self._cost(shape).of_block(shape.num_gpu_batches)
        return PlacementProblem(
            schedule=shape.schedule,
            prefill=prefill,
            decode=decode,
            decode_passes=job.gen_len - 1,
            sizes=self._sizes(shape),
            room={tier: space.capacity(tier) for tier in job.hardware.tiers},
            max_latency_s=None if job.max_latency_s is None else job.max_latency_s / space.ranks,
        )

    def _cost(self, shape: Policy) -> MicroBatchCost:
        divided = DIVIDED if shape.kv_moved else 0.0
        key = replace(shape, num_gpu_batches=1, schedule=Schedule.BLOCK, kv_moved=divided)
        if key not in self._costs:
            space = self.space
            of = (space.models[shape.lossy], key, space.job.hardware, space.request)
            self._costs[key] = (
                divided_cost(self._cost(replace(key, kv_moved=0.0)), *of) if divided else micro_batch_cost(*of)
            )
        return self._costs[key]

    def _kinds(self, shape: Policy) -> LayerKinds:
        return LayerKinds.of(self.space.models[shape.lossy], self.space.request)

    def _sizes(self, shape: Policy) -> dict[str, float]:
        job = self.space.job
        units = self.space.models[shape.lossy].packed_for(shape).units
        experts = sum(unit.home_bytes for unit in units if unit.kind is UnitKind.EXPERTS)
        token = kv_token_bytes(job.shape, job.dtype, shape)
        cached = self._kinds(shape).cached(job.prompt_len + job.gen_len - 1) if job.gen_len > 1 else 0
        hidden = job.prompt_len * job.shape.hidden_size * job.dtype.bytes
        block = self.space.under_way(shape)
        sizes = {
            "weights": float(sum(unit.home_bytes for unit in units) - experts),
            "kv_cache": float(block * cached * token),
            "activations": float(block * hidden),
            "experts": float(experts),
        }
        return {kind: sizes[kind] for kind in shape.placements}

    def _room(self, shape: Policy, held: tuple[str, ...]) -> dict[Tier, float]:
        """Bytes for what has shares: what the machine has, less staging and workspace, which a single layer's plan
        shows."""
        space, hardware = self.space, self.space.job.hardware
        here, tiers = hardware.compute_tier, hardware.tiers
        below = tiers[tiers.index(here) + 1]
        placed = {kind: Placement.all_on(here if kind in held else below) for kind in shape.placements}
        policy = replace(shape, **placed)  # type: ignore[arg-type]
        if policy not in self._rest:
            few = self._kinds(shape).few
            plan = space.plan_of(space.models[shape.lossy].shallow(few), policy, space.under_way(shape))
            layers = sum(unit.kind is UnitKind.LAYER for unit in plan.job.own)
            rest = {}
            for site, parts in plan.bytes.items():
                tails = parts.get("kv tails", 0) * (space.num_layers / layers - 1)
                rest[site.tier] = sum(b for n, b in parts.items() if n not in placed) + tails
            self._rest[policy] = rest
        return {t: space.capacity(t) - self._rest[policy].get(t, 0) for t in tiers}

    def _bound(self, shape: Policy, problem: PlacementProblem) -> float:
        """Tokens/s that no placement of this shape can beat: every link and processor at its least, whatever memory
        there is."""

        def least(phase: PhaseCost, resource: Lane) -> float:
            seconds = on_resource(phase.fixed, resource)
            for kind in problem.kinds:
                added = [on_resource(s, resource) for (of, _), s in phase.by_share.items() if of == kind]
                seconds += min(added)
            return seconds

        passes = problem.decode_passes
        prefill = [least(problem.prefill, one) for one in problem.resources]
        decode = [passes * least(problem.decode, one) for one in problem.resources]
        if shape.schedule is Schedule.BLOCK:
            seconds = max(prefill) + max(decode)
        else:
            seconds = max(a + b for a, b in zip(prefill, decode, strict=True))
        if problem.max_latency_s is not None and seconds > problem.max_latency_s:
            return 0.0
        return shape.block_size * self.space.job.gen_len / seconds


def _rank(candidate: Candidate) -> tuple[float, int]:
    """The highest bound first; of those whose bounds are the same, the larger block, in which less waits."""
    return round(math.log(candidate.bound, SAME)), -candidate.policy.block_size


def _way(policy: Policy, uses_disk: bool) -> object:
    sites = (policy.attention, policy.kv_moved > 0, policy.offloaded, policy.expert_loads)
    return (policy.schedule, *sites, policy.lossy, policy.prefetch, uses_disk)
