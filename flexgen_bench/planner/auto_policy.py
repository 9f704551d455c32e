"""``policy=auto``: searched for where the machine's rates are known, else by a rule that needs none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.planner.cohorts import Request, worst_of
from flexgen_bench.planner.default_policy import default_policy
from flexgen_bench.planner.search import Search
from flexgen_bench.planner.task import Task
from flexgen_bench.planner.units import PackedModel


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
) -> Policy:
    """A policy for these requests on this machine. Raises DoesNotFit if there is none.

    block_size: the most sequences per block; None: any number. lossy: goes into the policy as it is; ``packed`` is compressed accordingly.
    scored_rows: rows of logits that a scoring job wants at once.
    """
    if hardware.rates is None:
        return default_policy(
            shape, packed, dtype, hardware, requests, available, block_size, lossy, scored_rows
        )
    task = Task(
        shape, dtype, hardware, {lossy: packed}, worst_of(requests), len(requests), available, block_size,
        scored_rows=scored_rows,
    )  # fmt: skip
    return Search(task).run().policy
