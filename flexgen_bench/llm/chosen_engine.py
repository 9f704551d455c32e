"""The engine of a model: under the policy that was given, or under one that is chosen for the jobs that come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.policy import Policy
from flexgen_bench.engine.engine import Engine
from flexgen_bench.planner.forecast import forecast
from flexgen_bench.planner.scoring import LOGIT_ROWS, typical
from flexgen_bench.ranks.engines import AnyEngine, Engines
from flexgen_bench.ranks.ranked_engine import OPEN_JOBS, SCORING
from flexgen_bench.schedule.prefix_tree import ScoreRequest
from flexgen_bench.schedule.sequence_groups import Request

if TYPE_CHECKING:
    from torch import Tensor


class ChosenEngine:
    """policy: in force from the start; None: one is chosen for each job that the engine of the last one does not suit.
    lossy: what a chosen policy may change of the results; max_latency_s: of a block, of a chosen policy."""

    def __init__(self, engines: Engines, policy: Policy | None, lossy: Lossy, max_latency_s: float | None) -> None:
        self._engines = engines
        self._given, self._lossy, self._max_latency_s = policy, lossy, max_latency_s
        self._chosen_for = 0  # sequences of the largest job of generation so far
        self._engine: AnyEngine | None = None
        if policy is not None:  # refuse a policy that does not fit now, not at the first prompt
            self._engine = engines.make(policy)

    @property
    def policy(self) -> Policy | None:
        """The policy in force; None until a job has made the engine choose one."""
        return self._engine.policy if self._engine else None

    def for_generation(self, requests: Sequence[Request]) -> AnyEngine:
        """A chosen policy is kept while it fits, until a job of more than twice as many requests comes: one for a few
        sequences would be slow for many."""
        enough = len(requests) <= 2 * self._chosen_for
        fitting_engine = self._fitting(requests, 0, lambda engine: enough and engine.fits(requests))
        self._chosen_for = max(self._chosen_for, len(requests))
        return fitting_engine

    def for_open_jobs(self, requests: Sequence[Request]) -> Engine:
        """UserError for several ranks, which have no such jobs."""
        self.check_open_jobs()
        return self._engines.one(self.for_generation(requests), OPEN_JOBS)

    def check_open_jobs(self) -> None:
        """UserError for several ranks."""
        self._engines.check_one(OPEN_JOBS)

    def for_scoring(self, requests: Sequence[ScoreRequest]) -> Engine:
        """UserError for several ranks, which do not score."""
        self._engines.check_one(SCORING)

        def can_score(engine: AnyEngine) -> bool:
            return self._engines.one(engine, SCORING).can_score(requests)

        return self._engines.one(self._fitting(typical(requests), LOGIT_ROWS, can_score), SCORING)

    def log_probabilities(self, requests: Sequence[ScoreRequest]) -> Iterator[Tensor]:
        """Of each request in turn, the distributions of its tokens but the first; few are in memory at once."""
        start = 0
        while start < len(requests):
            stop, rows = start, 0
            while stop < len(requests) and (stop == start or rows < LOGIT_ROWS):
                rows += len(requests[stop].tokens)
                stop += 1
            part = requests[start:stop]
            yield from self.for_scoring(part).log_probabilities([r.tokens for r in part])
            start = stop

    def predicted_seconds(self, requests: Sequence[Request]) -> float:
        """Of a job of generation, by simulation of its plan, if no sequence ends early. UserError without rates, and
        for several ranks, of which a plan is one's."""
        self._engines.check_one("a prediction from one plan")
        times = forecast(self.for_generation(requests).plan(requests))
        return times.prefill_s + times.decode_s

    def close(self) -> None:
        """Release the weights. A second time does nothing."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _fitting(self, requests: Sequence[Request], scored_rows: int, fits: Callable[[AnyEngine], bool]) -> AnyEngine:
        if self._engine is not None:
            self._engine.check_free()
            if self._given is not None or fits(self._engine):
                return self._engine
            self.close()
        policy = self._engines.choose_policy(
            requests,
            lossy=self._lossy,
            scored_rows=scored_rows,
            max_latency_s=None if scored_rows else self._max_latency_s,
        )
        self._engine = self._engines.make(policy)
        return self._engine
