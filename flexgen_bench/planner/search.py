"""The policy of a job on a machine: batch shapes enumerated, placements by linear program, the best candidates
simulated.

1. Every batch shape (block, micro-batch, prompt chunk), way of working (schedule, attention site) and allowed
   compression becomes a linear program over placements (``candidates.py``), whose optimum is a bound: nothing waits in
   it.
2. The candidates of the highest bounds of every way of working are made real policies (whole layers, whole sequences,
   the memory plan's exact bytes) and run on simulated lanes (``evaluator.py``), until none is left whose bound is above
   what has been reached. Beside them, what lies on the accelerator altogether (``resident_policies.py``).
3. From the best of them, one choice at a time is changed as long as that helps (``neighbours.py``); from the policy of
   the heuristic that needs no rates (``default_policy.py``), too, if that is better still.
4. Last, a cache in host memory is divided among the link and the cpu (``Policy.kv_moved``), where a bound says that it
   may pay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice, zip_longest

from flexgen_bench.core.errors import DoesNotFit, UserError
from flexgen_bench.core.policy import AttentionSite, Placement, Policy, Schedule
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.candidates import Candidate, Candidates
from flexgen_bench.planner.choice import Choice
from flexgen_bench.planner.default_policy import default_policy
from flexgen_bench.planner.evaluator import Evaluator
from flexgen_bench.planner.neighbours import fine_neighbours, neighbours
from flexgen_bench.planner.progress import part, report
from flexgen_bench.planner.resident_policies import resident_policies
from flexgen_bench.planner.search_space import SearchSpace

OF_A_KIND = 4  # candidates of each way of working that are looked at closer, at most
LOOKED_AT = 10  # of all ways
WITH_ONE_BUFFER = 2  # of these, those that are looked at with a single staging buffer, too
# Steps that may be simulated to compare them (for each way of compressing that is permitted), and to improve on them:
# about 30 us each.
START_BUDGET = 100_000
STEP_BUDGET = 60_000
FINE_BUDGET = 30_000
# A bound that is no further above what has been reached is not: something waits in every policy.
WORTH = 1.05
_MOVED = (0.25, 0.5, 0.75)  # of a cache in host memory, tried where it lies
_PARTS = (1, 2, 3, 4, 6, 8)  # of a block, that several ranks start from, too
NEAR = 0.8  # a start with so much of the best one's speed may lead further
GAIN = 1.002  # what a change must bring to be taken

# Shares of a search's time that are over once programs are solved, the best of them simulated, single changes tried,
# and the heuristic's policy changed; roughly. The rest is for caches that are divided.
_PROGRAMS, _STARTS, _CHANGES, _HEURISTIC = 0.25, 0.4, 0.75, 0.85
# Of that rest, once its programs are solved, and the best of them simulated.
_DIVIDED_PROGRAMS, _DIVIDED_STARTS = 0.3, 0.6

Neighbourhood = Callable[[SearchSpace, Policy], Iterator[Policy]]


class Search:
    """Looks for the policy of a job with the most tokens per second (within its latency, if it has a bound)."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self._solver = Candidates(space)
        self._evaluator = Evaluator(space)
        self._placed: dict[Policy, Policy] = {}

    def run(self) -> Choice:
        """Raises DoesNotFit, of the most modest policy there is, if nothing fits; UserError if nothing keeps to the
        latency."""
        started = self._started()
        starts = [*_one_of_each(started), *resident_policies(self.space), *self._hidden_kept(started)]
        best = max(starts, key=self.tok_per_s, default=None)
        if best is None or not self.tok_per_s(best):
            best, starts = self._modest(), []
        near = [policy for policy in starts if self.tok_per_s(policy) > NEAR * self.tok_per_s(best)]
        near = near or [best]
        ends = []
        for number, start in enumerate(near):
            with part(_STARTS, _CHANGES), part(number / len(near), (number + 1) / len(near)):
                ends.append(self._changed(start))
        best = max(ends, key=self._evaluator.full_tok_per_s)
        heuristic = self._heuristic(best)
        with part(_CHANGES, _HEURISTIC):
            if heuristic is not None and self.tok_per_s(heuristic) > self.tok_per_s(best):
                best = self._changed(heuristic)
        with part(_HEURISTIC, 1.0):
            best = self._cache_divided(best)
        best = self._divided_anew(best)
        latest = self.space.job.max_latency_s
        if not self.tok_per_s(best) and latest is not None:
            raise self._too_late(latest)
        return self.choice(best, heuristic, tuple(started))

    def _started(self) -> list[Candidate]:
        """Where to start from, best first: what has the highest bounds, simulated. The best of every way of working,
        then the next of those whose bounds are above what has been reached; of the very best, with a single staging
        buffer, too (nothing is loaded ahead then, but more has room in memory)."""
        solver, evaluator = self._solver, self._evaluator
        with part(0.0, _PROGRAMS):
            ways = solver.ways(OF_A_KIND, report)
        started: list[Candidate] = []
        best = 0.0
        budget = START_BUDGET * len(self.space.lossies)
        while ways and len(started) < LOOKED_AT and evaluator.steps < budget:
            ways.sort(key=lambda way: -way[0].bound)
            for way in ways:
                report(_PROGRAMS + (_STARTS - _PROGRAMS) * evaluator.steps / budget)
                fitted = None
                if evaluator.steps >= budget:
                    break
                while way and fitted is None and way[0].bound > best:
                    fitted = solver.fitted(way.pop(0))
                if fitted is not None and fitted.bound > best and len(started) < LOOKED_AT:
                    started.append(fitted)
                    best = max(best, self.tok_per_s(fitted.policy))
            ways = [way for way in ways if way and way[0].bound > best]
        started.sort(key=lambda one: -self.tok_per_s(one.policy))
        for candidate in started[:WITH_ONE_BUFFER]:
            if candidate.policy.prefetch > 1:
                solved = solver.solved(replace(candidate.policy, prefetch=1))
                started += [one for one in map(solver.fitted, solved) if one is not None]
        return sorted(started, key=lambda one: -self.tok_per_s(one.policy))

    def _hidden_kept(self, started: list[Candidate]) -> list[Policy]:
        """Of several ranks, each has hidden states of every wave, and in a memory below they come behind whatever else
        the link brings. No program sees that, and no single change leads to smaller blocks that keep them."""
        if self.space.ranks == 1 or not started:
            return []
        shapes = [_smaller(started[0].policy, parts) for parts in _PARTS]
        kept = [one.policy for one in map(self._solver.with_hidden_kept, dict.fromkeys(shapes)) if one is not None]
        return [max(kept, key=self.tok_per_s)] if kept else []

    def _too_late(self, latest: float) -> UserError:
        """With the latency of a block of a single sequence, for what else might be asked."""
        single = replace(self.space.job, num_prompts=1, max_latency_s=None)
        soonest = Search(replace(self.space, job=single, block_size=1)).run()
        return UserError(
            "policy.max_latency_s",
            latest,
            f"more: the quickest found for a single sequence takes {soonest.forecast.total_s:.3g} s",
            "Allow more seconds, permit compression (policy.lossy), or ask for fewer tokens.",
        )

    def _heuristic(self, like: Policy) -> Policy | None:
        """The plain rule's policy for the same job, as compressed as ``like``; None if it has none that fits.

        The rule makes blocks as large as the job. Where the number of prompts is open it gets the block of ``like``.
        """
        space = self.space
        block = space.block_size if space.job.num_prompts is not None else like.block_size
        job = replace(space.job, num_prompts=space.count(like))
        try:
            return default_policy(replace(space, job=job, lossies=(like.lossy,), block_size=block))
        except DoesNotFit:
            return None

    def _changed(self, best: Policy) -> Policy:
        """Where single changes lead, coarse ones and then fine ones."""
        begun, most = self._evaluator.steps, STEP_BUDGET + FINE_BUDGET

        def steps() -> int:
            return self._evaluator.steps - begun

        def watch() -> None:
            report(steps() / most)

        best = self._improved(best, neighbours, lambda: steps() >= STEP_BUDGET, watch)
        return self._improved(best, fine_neighbours, lambda: steps() >= most, watch)

    def _divided_anew(self, best: Policy) -> Policy:
        """The same block in half as many micro-batches, or twice as many, if that is better on all layers: a shallow
        model cannot tell, for its embedding and head take a larger part of a pass."""
        if not self._evaluator.is_deep:
            return best
        size, count = best.gpu_batch_size, best.num_gpu_batches
        others = [
            replace(best, gpu_batch_size=a, num_gpu_batches=b)
            for a, b in ((2 * size, count // 2), (size // 2, 2 * count))
            if a * b == best.block_size
        ]
        near = [other for other in others if self.tok_per_s(other) > NEAR * self.tok_per_s(best)]
        return max([best, *near], key=self._evaluator.full_tok_per_s)

    def _cache_divided(self, best: Policy) -> Policy:
        """A policy whose cache is attended to in several places (``Policy.kv_moved``), if one is better: those of the
        highest bounds, and the best one with a part of its cache moved, changed one choice at a time. Behind all else,
        so that whatever is not divided is found as if nothing could be."""
        if self.space.job.hardware.compute_tier is not Tier.GPU:
            return best
        reached, evaluator = self.tok_per_s(best), self._evaluator
        begun, speeds = evaluator.steps, dict[Policy, float]()
        for start in self._divided_starts(best, WORTH * reached):
            spent = (evaluator.steps - begun) / START_BUDGET
            if spent >= 1:
                break
            report(_DIVIDED_PROGRAMS + (_DIVIDED_STARTS - _DIVIDED_PROGRAMS) * spent)
            speeds[start] = self.tok_per_s(start)
        start = max(speeds, key=lambda policy: speeds[policy], default=best)
        if start is best or speeds[start] <= NEAR * reached:
            return best
        begun = evaluator.steps

        def spent_on_changes() -> float:
            return (evaluator.steps - begun) / FINE_BUDGET

        with part(_DIVIDED_STARTS, 1.0):
            divided = self._improved(
                start, neighbours, lambda: spent_on_changes() >= 1, lambda: report(spent_on_changes())
            )
        # On all layers, too, as what is not divided was.
        full = evaluator.full_tok_per_s
        return divided if self.tok_per_s(divided) > GAIN * reached and full(divided) > GAIN * full(best) else best

    def _divided_starts(self, best: Policy, least: float) -> Iterator[Policy]:
        """Of both schedules in turn, since what one loses to waiting is not in its bound; none if no program's bound is
        above ``least``."""
        with part(0.0, _DIVIDED_PROGRAMS):
            candidates = self._solver.divided(best, least, report)
        of_each = ([one for one in candidates if one.policy.schedule is schedule] for schedule in Schedule)
        in_turn = filter(None, chain.from_iterable(zip_longest(*of_each)))
        for fitted in map(self._solver.fitted, islice(in_turn, 2 * OF_A_KIND)):
            if fitted is not None:
                yield fitted.policy
        if candidates and best.kv_cache.share(Tier.CPU):
            yield from (replace(best, attention=AttentionSite.CPU, kv_moved=share) for share in _MOVED)

    def _improved(
        self, best: Policy, around: Neighbourhood, is_spent: Callable[[], bool], watch: Callable[[], None]
    ) -> Policy:
        """Change one thing at a time as long as that helps, and there are steps left to simulate. What has no room
        with the tensors where they are is placed anew."""
        changed = True
        while changed:
            changed = False
            for neighbour in around(self.space, best):
                if is_spent():
                    return best
                watch()
                policy = neighbour
                if not self._evaluator.fits(policy) and _placement(policy) == _placement(best):
                    policy = self._placed_anew(neighbour)
                if self.tok_per_s(policy) > GAIN * self.tok_per_s(best):
                    best, changed = policy, True
                    break
        return best

    def _placed_anew(self, shape: Policy) -> Policy:
        """The same batches and way of working, with the best placement that fits; the policy itself if there is none,
        or only one with the disk for what was without."""
        if shape not in self._placed:
            disk = shape.lowest_tier is Tier.DISK
            solved = [one for one in self._solver.solved(shape) if one.uses_disk <= disk]
            fitted = self._solver.fitted(solved[0]) if solved else None
            self._placed[shape] = shape if fitted is None else fitted.policy
        return self._placed[shape]

    def _modest(self) -> Policy:
        """What needs the least memory: if not even that fits, its DoesNotFit says what is missing."""
        models = self.space.models
        lossy = min(models, key=lambda one: models[one].packed.file_bytes)
        low, next_to = Placement.all_on(Tier.DISK), Placement.all_on(Tier.CPU)
        modest = Policy(1, 1, low, low, next_to, prefetch=1, prefill_chunk=64, lossy=lossy)
        self.space.plan(modest)
        return modest

    def tok_per_s(self, policy: Policy) -> float:
        """Of any policy, judged as those of the search are; 0 for what does not fit or takes too long."""
        return self._evaluator.tok_per_s(policy)

    def choice(self, best: Policy, heuristic: Policy | None, candidates: tuple[Candidate, ...]) -> Choice:
        """A policy that fits, with its plan and its times, and what else was considered."""
        times = self._evaluator.of_choice(best)
        speed = self.space.count(best) * self.space.job.gen_len / self.space.total_s(times)
        tried, other = self._evaluator.tried, self._evaluator.alternative(best)
        return Choice(best, self.space.plan(best), times, speed, tried, heuristic, candidates, other)


def _one_of_each(started: list[Candidate]) -> list[Policy]:
    """The best of those that use the disk, and of those that do not: no single change leads from one to the other."""
    best: dict[bool, Policy] = {}
    for candidate in started:
        best.setdefault(candidate.uses_disk, candidate.policy)
    return list(best.values())


def _smaller(policy: Policy, parts: int) -> Policy:
    """Of a block a part, in micro-batches that are no larger."""
    block = max(1, policy.block_size // parts)
    count = -(-block // policy.gpu_batch_size)
    return replace(policy, gpu_batch_size=-(-block // count), num_gpu_batches=count)


def _placement(policy: Policy) -> tuple[Placement, ...]:
    return tuple(policy.placements.values())
