"""``policy=auto``: searched for where the machine's rates are known, else by a rule that needs none.

A search takes what its predictions say is fastest, and predictions are off by some 8 % (docs/notes/planner.md). So
where it promises little more than the rule's policy, which keeps caches in memory and has kept its promises better,
that one is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.models.packing import PackedModel
from flexgen_bench.planner.choice import Choice
from flexgen_bench.planner.default_policy import default_policy
from flexgen_bench.planner.search import Search
from flexgen_bench.planner.task import Task
from flexgen_bench.schedule.sequence_groups import Request, worst_of

# A searched policy must promise so much more than the rule's: differences within the errors of predictions are not
# worth another way of working.
LEAST_GAIN = 1.1


@dataclass(frozen=True)
class AutoChoice:
    """What is to be run. gain: by what part the best found promises more, where the rule's policy was preferred to it;
    else None."""

    choice: Choice
    gain: float | None = None


def auto_policy(
    shape: ModelShape,
    packed: PackedModel,
    dtype: DType,
    hardware: HardwareProfile,
    requests: Sequence[Request],
    available: Mapping[Tier, int],
    block_size: int | None = None,
    lossy: Lossy = EXACT,
    scored_rows: int = 0,
    max_latency_s: float | None = None,
) -> Policy:
    """A policy for these requests on this machine. Raises DoesNotFit if there is none.

    block_size: the most sequences per block; None: any number. lossy: goes into the policy as it is; ``packed`` is
    compressed accordingly.
    scored_rows: rows of logits that a scoring job wants at once. max_latency_s: of a block, from its start to its last
    token; UserError if nothing keeps to it, or nobody can say.
    """
    if hardware.rates is None and max_latency_s is not None:
        raise UserError(
            "policy.max_latency_s",
            max_latency_s,
            f"left out on gpu={hardware.name}, whose rates nobody has measured",
            "Measure this machine with python -m flexgen_bench.calibrate.",
        )
    if hardware.rates is None:
        return default_policy(shape, packed, dtype, hardware, requests, available, block_size, lossy, scored_rows)
    task = Task(
        shape,
        dtype,
        hardware,
        {lossy: packed},
        worst_of(requests),
        len(requests),
        available,
        block_size,
        max_latency_s=max_latency_s,
        scored_rows=scored_rows,
    )
    return auto_choice(task).choice.policy


def auto_choice(task: Task) -> AutoChoice:
    """The policy of a task on a machine whose rates are known. Raises DoesNotFit if there is none."""
    search = Search(task)
    found = search.run()
    ruled = found.ruled
    if ruled is None or ruled == found.policy:
        return AutoChoice(found)
    # Both are played in the same way: what is chosen in the end may have been played on more layers.
    promised, plain = search.tok_per_s(found.policy), search.tok_per_s(ruled)
    if not plain or promised > LEAST_GAIN * plain:  # 0: it takes longer than it may
        return AutoChoice(found)
    return AutoChoice(search.choice(ruled, ruled, found.candidates), promised / plain - 1)
