"""The search for the batch a system does best with: the same recorded budget for every system.

Batch sizes are tried from small to large on a short generation; its prefill and per-token times are scaled
up to the whole workload. The search ends when the projected rate falls or a size does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from flexgen_bench.core.record import TuningProbe
from flexgen_bench.core.workload import Workload


def candidates(batch_sizes: Sequence[int], num_prompts: int) -> list[int]:
    """The sizes to try, ascending; none above the number of prompts, which is itself the largest batch."""
    return sorted({min(size, num_prompts) for size in batch_sizes})


def projected_rate(batch_size: int, prefill_s: float, decode_s: float, probe_gen_len: int, workload: Workload) -> float:
    """Generated tokens/s of the whole workload, from one probed batch of ``batch_size`` prompts.

    The last, smaller batch is counted as a full one: where weights are streamed it costs as much.
    """
    step_s = decode_s / (probe_gen_len - 1)
    batch_s = prefill_s + step_s * (workload.gen_len - 1)
    batches = math.ceil(workload.num_prompts / batch_size)
    return workload.num_prompts * workload.gen_len / (batches * batch_s)


def next_candidate(sizes: Sequence[int], probes: Sequence[TuningProbe]) -> int | None:
    """The size to try after ``probes``; None when the search is over."""
    if probes and probes[-1].tok_per_s is None:
        return None  # a larger batch would not fit either
    rates = [probe.tok_per_s or 0.0 for probe in probes]
    if len(rates) >= 2 and rates[-1] < rates[-2]:
        return None
    tried = {probe.batch_size for probe in probes}
    return next((size for size in sizes if size not in tried), None)


def best(probes: Sequence[TuningProbe]) -> int | None:
    """The size with the highest projected rate; None if no probe succeeded."""
    good = [probe for probe in probes if probe.tok_per_s is not None]
    return max(good, key=lambda p: p.tok_per_s or 0.0).batch_size if good else None
