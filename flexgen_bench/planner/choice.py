"""The outcome of a search for a policy."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexgen_bench.core.policy import Policy
from flexgen_bench.planner.candidates import Candidate
from flexgen_bench.planner.forecast import Forecast
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.planner.why import Alternative


@dataclass(frozen=True)
class Choice:
    """The policy found, its plan, and its times. tried: policies simulated; heuristic: the plain rule's policy, None if
    it has none that fits; candidates: of the linear programs, the highest bound first; other: the best that works in
    another way, None if none was simulated."""

    policy: Policy
    plan: MemoryPlan
    forecast: Forecast
    tok_per_s: float
    tried: int
    heuristic: Policy | None = None
    candidates: tuple[Candidate, ...] = field(repr=False, default=())
    other: Alternative | None = None
