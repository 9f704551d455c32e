"""``policy=auto``: searched for where the machine's rates are known, else by a heuristic that needs none.

A search takes what its predictions say is fastest, and predictions are off by some 8 % (docs/notes/planner.md). So
where it is predicted to win little over the heuristic's policy, which keeps caches in memory and has kept closer to its
predictions, that one is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.policy import Policy
from flexgen_bench.planner.choice import Choice
from flexgen_bench.planner.default_policy import default_policy
from flexgen_bench.planner.search import Search
from flexgen_bench.planner.search_space import SearchSpace

# A searched policy must be predicted so much faster than the heuristic's: differences within the errors of predictions
# are not worth another way of working.
LEAST_GAIN = 1.1


@dataclass(frozen=True)
class AutoChoice:
    """What is to be run. gain: by what part the best found is predicted to be faster, where the heuristic's policy was
    preferred to it; else None."""

    choice: Choice
    gain: float | None = None


def auto_policy(space: SearchSpace) -> Policy:
    """A policy for a job on a machine, whether its rates are known or not. Raises DoesNotFit if there is none, and
    UserError if nothing keeps to the job's latency, or nobody can say."""
    job = space.job
    if job.hardware.rates is not None:
        return auto_choice(space).choice.policy
    if job.max_latency_s is not None:
        raise UserError(
            "policy.max_latency_s",
            job.max_latency_s,
            f"left out on gpu={job.hardware.name}, whose rates nobody has measured",
            "Measure this machine with python -m flexgen_bench.calibrate.",
        )
    return default_policy(space)


def auto_choice(space: SearchSpace) -> AutoChoice:
    """The policy of a job on a machine whose rates are known. Raises DoesNotFit if there is none."""
    search = Search(space)
    best = search.run()
    heuristic = best.heuristic
    if heuristic is None or heuristic == best.policy:
        return AutoChoice(best)
    # Both are simulated in the same way: what is chosen in the end may have been simulated on more layers.
    searched_rate, rule_rate = search.tok_per_s(best.policy), search.tok_per_s(heuristic)
    if not rule_rate or searched_rate > LEAST_GAIN * rule_rate:  # 0: it takes longer than it may
        return AutoChoice(best)
    return AutoChoice(search.choice(heuristic, heuristic, best.candidates), searched_rate / rule_rate - 1)
