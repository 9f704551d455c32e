"""The policy of a job on a machine: batch shapes enumerated, placements by linear program, the best candidates played.

1. Every batch shape (block, micro-batch, prompt chunk), way of working (schedule, attention site) and allowed
compression becomes a linear program
   over placements (``candidates.py``), whose optimum is a bound: nothing waits in it.
2. The most promising of every way of working are made real policies (whole layers, whole sequences, the memory plan's
exact bytes) and played on
   simulated lanes, until none is left that promises more than has been reached.
3. From the best of them, one choice at a time is changed as long as that helps (``moves.py``); from the policy of the
rule that needs no
   rates (``default_policy.py``), too, if that is better still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from flexgen_bench.core.errors import DoesNotFit, UserError
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.batch_costs import thinned
from flexgen_bench.planner.candidates import Candidate, Candidates
from flexgen_bench.planner.choice import Choice
from flexgen_bench.planner.default_policy import default_policy
from flexgen_bench.planner.forecast import Forecast, forecast
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job, weight_tiers
from flexgen_bench.planner.neighbours import fine_moves, moves
from flexgen_bench.planner.pass_kinds import POINTS as TOLD_POINTS
from flexgen_bench.planner.progress import report
from flexgen_bench.planner.task import Task
from flexgen_bench.planner.why import Alternative, busy_shares, way_of_working

OF_A_KIND = 4  # candidates of each way of working that are looked at closer, at most
LOOKED_AT = 10  # of all ways
ONE_SLOT = 2  # of these, those that are looked at with a single staging buffer, too
# Steps that may be played to compare them (for each way of compressing that is permitted), and to improve on them:
# about 30 us each.
START_BUDGET = 100_000
STEP_BUDGET = 60_000
FINE_BUDGET = 30_000
# A deeper model is judged by so many of its layers: they are alike. More, up to twice as many, where a tier would have
# another share of them than it has of all: what is read from it is off by at most this part, or as little as that many
# layers allow.
THIN_LAYERS = 12
SHARE_ERROR = 0.05
NEAR = 0.8  # a start that promises so much of what the best does may lead further
POINTS = 3  # passes of a kind that are played while policies are compared
GAIN = 1.002  # what a change must bring to be taken
# The policy found is played on all layers if that takes no more steps than this.
FULL_STEPS = 60_000

_BELOW = (Tier.CPU, Tier.DISK)  # what is read from them takes time

# Shares of a search's time that are over once programs are solved, the best of them played, and single changes tried;
# roughly.
_PROGRAMS, _STARTS, _MOVES = 0.25, 0.4, 0.8

Neighbours = Callable[[Task, Policy], Iterator[Policy]]


class Search:
    """Looks for the policy of a task with the most tokens per second (within its latency, if it has a bound)."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._solver = Candidates(task)
        self._known: dict[Policy, Forecast | None] = {}  # None: does not fit
        self._anew: dict[Policy, Policy] = {}
        self._in_full: dict[Policy, Forecast] = {}
        self._steps = 0

    def run(self) -> Choice:
        """Raises DoesNotFit, of the most modest policy there is, if nothing fits; UserError if nothing keeps to the
        latency."""
        started = self._started()
        starts = _one_of_each(started)
        best = max(starts, key=self._play, default=None)
        if best is None or not self._play(best):
            best, starts = self._modest(), []
        near = [policy for policy in starts if self._play(policy) > NEAR * self._play(best)]
        near = near or [best]
        parts = [_STARTS + (_MOVES - _STARTS) * n / len(near) for n in range(len(near) + 1)]
        ends = [self._moved(*one) for one in zip(near, parts[:-1], parts[1:], strict=True)]
        report(_MOVES)
        best = max(ends, key=self._whole_speed)
        ruled = self._ruled(best)
        if ruled is not None and self._play(ruled) > self._play(best):
            best = self._moved(ruled, _MOVES, 1.0)
        best = self._divided_anew(best)
        if not self._play(best) and self.task.max_latency_s is not None:
            raise self._too_late(self.task.max_latency_s)
        return self.choice(best, ruled, tuple(started))

    def _started(self) -> list[Candidate]:
        """Where to start from, best first: what is most promising, played. The best of every way of working, then the
        next of those that promise more than has been reached; of the very best, with a single staging buffer, too
        (nothing is loaded ahead then, but more has room in memory)."""
        solver = self._solver
        ways = solver.ways(OF_A_KIND, lambda share: report(_PROGRAMS * share))
        found: list[Candidate] = []
        best = 0.0
        budget = START_BUDGET * len(self.task.packed)
        while ways and len(found) < LOOKED_AT and self._steps < budget:
            ways.sort(key=lambda way: -way[0].tok_per_s)
            for way in ways:
                report(_PROGRAMS + (_STARTS - _PROGRAMS) * self._steps / budget)
                fitted = None
                if self._steps >= budget:
                    break
                while way and fitted is None and way[0].tok_per_s > best:
                    fitted = solver.fitted(way.pop(0))
                if fitted is not None and fitted.tok_per_s > best and len(found) < LOOKED_AT:
                    found.append(fitted)
                    best = max(best, self._play(fitted.policy))
            ways = [way for way in ways if way and way[0].tok_per_s > best]
        found.sort(key=lambda one: -self._play(one.policy))
        for candidate in found[:ONE_SLOT]:
            if candidate.policy.prefetch > 1:
                solved = solver.solved(replace(candidate.policy, prefetch=1))
                found += [one for one in map(solver.fitted, solved) if one is not None]
        return sorted(found, key=lambda one: -self._play(one.policy))

    def _too_late(self, latest: float) -> UserError:
        """With the latency of a block of a single sequence, for what else might be asked."""
        soonest = Search(replace(self.task, block=1, prompts=1, max_latency_s=None)).run()
        return UserError(
            "policy.max_latency_s",
            latest,
            f"more: the quickest found for a single sequence takes {soonest.forecast.total_s:.3g} s",
            "Allow more seconds, permit compression (policy.lossy), or ask for fewer tokens.",
        )

    def _ruled(self, like: Policy) -> Policy | None:
        """The rule's policy for the same job, as compressed as ``like``; None if it has none that fits.

        The rule makes blocks as large as the job. Where the number of prompts is open it gets the block of ``like``.
        """
        task = self.task
        block = task.block if task.prompts is not None else like.block_size
        try:
            return default_policy(
                task.shape,
                task.packed[like.lossy],
                task.dtype,
                task.hardware,
                [task.request] * task.count(like),
                task.available,
                block,
                like.lossy,
                task.scored_rows,
            )
        except DoesNotFit:
            return None

    def _moved(self, best: Policy, begin: float, end: float) -> Policy:
        """Where single changes lead, coarse ones and then fine ones. begin, end: as shares of the search, for who
        watches it."""
        self._steps, most = 0, STEP_BUDGET + FINE_BUDGET

        def watch() -> None:
            report(begin + (end - begin) * self._steps / most)

        best = self._improved(best, moves, STEP_BUDGET, watch)
        return self._improved(best, fine_moves, most, watch)

    def _divided_anew(self, best: Policy) -> Policy:
        """The same block in half as many micro-batches, or twice as many, if that is better on all layers: a shallow
        model cannot tell, for its embedding and head take a larger part of a pass."""
        if self.task.shape.num_layers <= 2 * THIN_LAYERS:
            return best
        size, count = best.gpu_batch_size, best.num_gpu_batches
        others = [
            replace(best, gpu_batch_size=a, num_gpu_batches=b)
            for a, b in ((2 * size, count // 2), (size // 2, 2 * count))
            if a * b == best.block_size
        ]
        near = [other for other in others if self._play(other) > NEAR * self._play(best)]
        return max([best, *near], key=self._whole_speed)

    def _improved(self, best: Policy, neighbours: Neighbours, budget: int, watch: Callable[[], None]) -> Policy:
        """Change one thing at a time as long as that helps, and there are steps left to play. What has no room with the
        tensors where they are is placed anew."""
        changed = True
        while changed:
            changed = False
            for neighbour in neighbours(self.task, best):
                if self._steps >= budget:
                    return best
                watch()
                policy = neighbour
                if self._played(policy) is None and _placement(policy) == _placement(best):
                    policy = self._placed_anew(neighbour)
                if self._play(policy) > GAIN * self._play(best):
                    best, changed = policy, True
                    break
        return best

    def _placed_anew(self, shape: Policy) -> Policy:
        """The same batches and way of working, with the best placement that fits; the policy itself if there is none,
        or only one with the disk for what was without."""
        if shape not in self._anew:
            disk = shape.lowest_tier is Tier.DISK
            solved = [one for one in self._solver.solved(shape) if one.uses_disk <= disk]
            fitted = self._solver.fitted(solved[0]) if solved else None
            self._anew[shape] = shape if fitted is None else fitted.policy
        return self._anew[shape]

    def _modest(self) -> Policy:
        """What needs the least memory: if not even that fits, its DoesNotFit says what is missing."""
        task, lossy = (self.task, min(self.task.packed, key=lambda one: self.task.packed[one].file_bytes))
        low, next_to = Placement.all_on(Tier.DISK), Placement.all_on(Tier.CPU)
        modest = Policy(1, 1, low, low, next_to, prefetch=1, prefill_chunk=64, lossy=lossy)
        task.plan(modest)
        return modest

    def tok_per_s(self, policy: Policy) -> float:
        """Of any policy, judged as those of the search are; 0 for what does not fit or takes too long."""
        return self._play(policy)

    def choice(self, best: Policy, ruled: Policy | None, candidates: tuple[Candidate, ...]) -> Choice:
        """A policy that fits, with its plan and its times, and what else was considered."""
        plan, found = self.task.plan(best), self._told(best)
        speed = self.task.count(best) * self.task.request.gen_len / found.total_s
        return Choice(best, plan, found, speed, len(self._known), ruled, candidates, self._other(best))

    def _other(self, chosen: Policy) -> Alternative | None:
        """The fastest of what was played that works in another way and is no faster."""
        mine, most = way_of_working(chosen), self._play(chosen)
        others = [p for p in self._known if way_of_working(p) != mine and 0 < self._play(p) <= most]
        best = max(others, key=self._play, default=None)
        if best is None:
            return None
        times = self._played(best)
        assert times is not None, "it has a speed"
        return Alternative(best, self._play(best) / most, busy_shares(times, self.task.hardware))

    def _whole_speed(self, policy: Policy) -> float:
        return self._speed(policy, self._whole(policy)) if self._played(policy) else 0.0

    def _whole(self, policy: Policy) -> Forecast:
        """Of a policy that fits: played on all layers where that does not take too long."""
        found = self._played(policy)
        assert found is not None, "what is chosen fits"
        if self._is_long(found):
            return found
        if policy not in self._in_full:
            self._in_full[policy] = self._of_all(policy, POINTS)
        return self._in_full[policy]

    def _told(self, policy: Policy) -> Forecast:
        """Of the policy chosen: the same, with as many passes of every kind as a given policy's forecast has."""
        found = self._whole(policy)
        return found if self._is_long(found) else self._of_all(policy, TOLD_POINTS)

    def _is_long(self, played: Forecast) -> bool:
        """Whether a policy takes too many steps to be played on all layers, going by what was played of it."""
        return played.steps * self.task.shape.num_layers >= FULL_STEPS * THIN_LAYERS

    def _play(self, policy: Policy) -> float:
        """Tokens/s on simulated lanes; 0 for what does not fit or takes too long."""
        found = self._played(policy)
        return 0.0 if found is None else self._speed(policy, found)

    def _played(self, policy: Policy) -> Forecast | None:
        """Played once, however often it is asked about."""
        if policy not in self._known:
            try:
                plan = self.task.plan(policy)
            except DoesNotFit:
                self._known[policy] = None
            else:
                self._known[policy] = self._times(policy, plan)
        return self._known[policy]

    def _speed(self, policy: Policy, times: Forecast) -> float:
        count, latest = self.task.count(policy), self.task.max_latency_s
        blocks = max(1.0, count / policy.block_size)
        if latest is not None and times.total_s / blocks > latest:
            return 0.0
        return count * self.task.request.gen_len / times.total_s

    def _times(self, policy: Policy, plan: MemoryPlan) -> Forecast:
        """Of the whole job; of a deep model, from a shallow one."""
        layers = self.task.shape.num_layers
        if layers <= 2 * THIN_LAYERS:
            return self._of(policy, layers)
        few = self._like_all(policy, plan)
        return self._of(policy, few).deeper(layers / few, policy.overlap)

    def _like_all(self, policy: Policy, plan: MemoryPlan) -> int:
        """How many layers lie on the tiers as all of them do, nearly."""
        layers, packed = self.task.shape.num_layers, self.task.packed[policy.lossy]
        wanted = _shares([unit.tier for unit in plan.job.units])

        def error(few: int) -> float:
            thin = thinned(self.task.shape, packed, few)
            found = _shares(weight_tiers(thin.packed, policy.weights))
            return max(abs(found[t] - wanted[t]) / (wanted[t] or 1 / layers) for t in _BELOW)

        best = THIN_LAYERS
        for few in range(THIN_LAYERS, 2 * THIN_LAYERS + 1):
            if error(few) <= SHARE_ERROR:
                return few
            best = min(best, few, key=error)
        return best

    def _of(self, policy: Policy, layers: int) -> Forecast:
        task = self.task
        thin = thinned(task.shape, task.packed[policy.lossy], layers)
        plan = plan_job(
            thin.shape,
            thin.packed,
            task.dtype,
            policy,
            task.hardware,
            [task.request] * task.count(policy),
            scored_rows=task.scored_rows,
        )
        found = forecast(thin.shape, thin.packed, task.dtype, policy, task.hardware, plan, points=POINTS)
        self._steps += found.steps
        return found

    def _of_all(self, policy: Policy, points: int) -> Forecast:
        """On all layers; does not count as a try."""
        task = self.task
        return forecast(
            task.shape, task.packed[policy.lossy], task.dtype, policy, task.hardware, task.plan(policy), points=points
        )


def _one_of_each(started: list[Candidate]) -> list[Policy]:
    """The best of those that use the disk, and of those that do not: no single change leads from one to the other."""
    found: dict[bool, Policy] = {}
    for candidate in started:
        found.setdefault(candidate.uses_disk, candidate.policy)
    return list(found.values())


def _shares(tiers: list[Tier]) -> dict[Tier, float]:
    """Of the layers alone, without embedding and head."""
    layers = tiers[1:-1]
    return {tier: layers.count(tier) / len(layers) for tier in Tier}


def _placement(policy: Policy) -> tuple[Placement, ...]:
    return policy.weights, policy.kv_cache, policy.activations
