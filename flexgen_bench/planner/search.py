"""The policy of a job on a machine: batch shapes enumerated, placements by linear program, the best candidates played.

1. Every batch shape (block, micro-batch, prompt chunk), way of working (schedule, attention site) and allowed compression becomes a linear program
   over placements (``candidates.py``), whose optimum is a bound: nothing waits in it.
2. The most promising are made real policies (whole layers, whole sequences, the memory plan's exact bytes) and played on simulated lanes.
3. From the best of them, one choice at a time is changed as long as that helps (``moves.py``); from the policy of the rule that needs no
   rates (``default_policy.py``), too, if that is better still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.batch_costs import thinned
from flexgen_bench.planner.candidates import Candidate, Candidates
from flexgen_bench.planner.default_policy import default_policy
from flexgen_bench.planner.forecast import Forecast, closed_form, forecast
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.planner.moves import fine_moves, moves
from flexgen_bench.planner.placement_lp import solve
from flexgen_bench.planner.task import Task

OF_A_KIND = 2  # candidates of each way of working that are looked at closer
LOOKED_AT = 12
ONE_SLOT = 4  # of these, those that are looked at with a single staging slot, too
PLAYED = 4  # of them all, by closed form, those that are played
# Steps that may be played to improve on them: about 20 us each.
STEP_BUDGET = 60_000
FINE_BUDGET = 30_000
# A deeper model is judged by so many of its layers: they are alike.
THIN_LAYERS = 12
POINTS = 3  # passes of a kind that are played while policies are compared
GAIN = 1.002  # what a change must bring to be taken
# The policy found is played on all layers if that takes no more steps than this.
FULL_STEPS = 60_000

Play = Callable[..., Forecast]
Neighbours = Callable[[Task, Policy], Iterator[Policy]]


@dataclass(frozen=True)
class Choice:
    """The policy found, its plan, and its times. tried: policies played; ruled: the rule's policy, None if it has none that fits;
    candidates: of the linear programs, best promise first."""

    policy: Policy
    plan: MemoryPlan
    forecast: Forecast
    tok_per_s: float
    tried: int
    ruled: Policy | None = None
    candidates: tuple[Candidate, ...] = field(repr=False, default=())


class Search:
    """Looks for the policy of a task with the most tokens per second (within its latency, if it has a bound)."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._known: dict[Policy, Forecast | None] = {}  # None: does not fit
        self._steps = 0

    def run(self) -> Choice:
        """Raises DoesNotFit, of the most modest policy there is, if nothing fits."""
        solver = Candidates(self.task)
        candidates = solver.best(OF_A_KIND)
        looked_at = candidates[:LOOKED_AT]
        # With a single staging slot nothing is loaded ahead, but what would be on disk may have room in memory.
        for candidate in candidates[:ONE_SLOT]:
            looked_at += solver.solved(replace(candidate.policy, prefetch=1), candidate.problem)
        fitting = [p for c in looked_at if (p := self._fitted(c)) is not None]
        fitting = list(dict.fromkeys(fitting))
        fitting.sort(key=lambda policy: -self._promise(policy))
        best = max(fitting[:PLAYED], key=self._play, default=None)
        if best is None or not self._play(best):
            best = self._modest()
        best = self._moved(best)
        ruled = self._ruled(best)
        if ruled is not None and self._play(ruled) > self._play(best):
            best = self._moved(ruled)
        return self.choice(best, ruled, tuple(candidates))

    def _ruled(self, like: Policy) -> Policy | None:
        """The rule's policy for the same job, as compressed as ``like``; None if it has none that fits.

        The rule makes blocks as large as the job. Where the number of prompts is open it gets the block of ``like``.
        """
        task = self.task
        block = task.block if task.prompts is not None else like.block_size
        try:
            return default_policy(
                task.shape, task.packed[like.lossy], task.dtype, task.hardware, [task.request] * task.count(like),
                task.available, block, like.lossy, task.scored_rows,
            )  # fmt: skip
        except DoesNotFit:
            return None

    def _moved(self, best: Policy) -> Policy:
        """Where single changes lead, coarse ones and then fine ones."""
        self._steps = 0
        best = self._improved(best, moves, STEP_BUDGET)
        return self._improved(best, fine_moves, STEP_BUDGET + FINE_BUDGET)

    def _improved(self, best: Policy, neighbours: Neighbours, budget: int) -> Policy:
        """Change one thing at a time as long as that helps, and there are steps left to play."""
        changed = True
        while changed:
            changed = False
            for policy in neighbours(self.task, best):
                if self._steps >= budget:
                    return best
                if self._play(policy) > GAIN * self._play(best):
                    best, changed = policy, True
                    break
        return best

    def _fitted(self, candidate: Candidate) -> Policy | None:
        """The candidate's policy; where whole layers and sequences take more than shares, placed again in so much less room."""
        policy, room = candidate.policy, dict(candidate.problem.room)
        for _ in range(5):
            try:
                self.task.plan(policy)
            except DoesNotFit as error:
                room[Tier(error.tier)] -= 1.02 * (error.need_bytes - error.capacity_bytes)
                solution = solve(replace(candidate.problem, room=room))
                if solution is None:
                    return None
                policy = solution.applied_to(policy)
            else:
                return policy
        return None

    def _modest(self) -> Policy:
        """What needs the least memory: if not even that fits, its DoesNotFit says what is missing."""
        task, lossy = (
            self.task,
            min(self.task.packed, key=lambda one: self.task.packed[one].file_bytes),
        )
        low, next_to = Placement.all_on(Tier.DISK), Placement.all_on(Tier.CPU)
        modest = Policy(1, 1, low, low, next_to, prefetch=1, prefill_chunk=64, lossy=lossy)
        task.plan(modest)
        return modest

    def tok_per_s(self, policy: Policy) -> float:
        """Of any policy, judged as those of the search are; 0 for what does not fit or takes too long."""
        return self._play(policy)

    def choice(
        self, best: Policy, ruled: Policy | None, candidates: tuple[Candidate, ...]
    ) -> Choice:
        """A policy that fits, with its plan and its times, and what else was considered."""
        plan, found = self.task.plan(best), self._played(best)
        assert found is not None, "what is chosen fits"
        if found.steps * self.task.shape.num_layers < FULL_STEPS * THIN_LAYERS:
            packed = self.task.packed[best.lossy]
            found = forecast(
                self.task.shape, packed, self.task.dtype, best, self.task.hardware, plan
            )
        speed = self.task.count(best) * self.task.request.gen_len / found.total_s
        return Choice(best, plan, found, speed, len(self._known), ruled, candidates)

    def _promise(self, policy: Policy) -> float:
        """Tokens/s in closed form."""
        return self._speed(policy, self._times(policy, closed_form))

    def _play(self, policy: Policy) -> float:
        """Tokens/s on simulated lanes; 0 for what does not fit or takes too long."""
        found = self._played(policy)
        return 0.0 if found is None else self._speed(policy, found)

    def _played(self, policy: Policy) -> Forecast | None:
        """Played once, however often it is asked about."""
        if policy not in self._known:
            try:
                self.task.plan(policy)
            except DoesNotFit:
                self._known[policy] = None
            else:
                self._known[policy] = self._times(policy, forecast)
        return self._known[policy]

    def _speed(self, policy: Policy, times: Forecast) -> float:
        count, latest = self.task.count(policy), self.task.max_latency_s
        blocks = max(1.0, count / policy.block_size)
        if latest is not None and times.total_s / blocks > latest:
            return 0.0
        return count * self.task.request.gen_len / times.total_s

    def _times(self, policy: Policy, play: Play) -> Forecast:
        """Of the whole job; of a deep model, from a shallow one."""
        layers = self.task.shape.num_layers
        if layers <= 2 * THIN_LAYERS:
            return self._of(policy, layers, play)
        return self._of(policy, THIN_LAYERS, play).deeper(layers / THIN_LAYERS, policy.overlap)

    def _of(self, policy: Policy, layers: int, play: Play) -> Forecast:
        task = self.task
        thin = thinned(task.shape, task.packed[policy.lossy], layers)
        plan = plan_job(
            thin.shape, thin.packed, task.dtype, policy, task.hardware,
            [task.request] * task.count(policy), scored_rows=task.scored_rows,
        )  # fmt: skip
        found = play(
            thin.shape, thin.packed, task.dtype, policy, task.hardware, plan, points=POINTS
        )
        self._steps += found.steps
        return found
