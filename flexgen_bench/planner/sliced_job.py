"""A job on ranks that share every layer, seen by one of them."""

from __future__ import annotations

from dataclasses import replace

from flexgen_bench.core.job import Job
from flexgen_bench.core.slices import Slice
from flexgen_bench.planner.rank_machines import in_one_machine, searched_on


def slice_of(job: Job) -> Job:
    """Of a job on ranks of one machine that share every layer, what one of them does: all are alike, and do it at the
    same time. It has its share of what they have in common: host memory, cores, disk."""
    ranks = job.hardware.tensor_parallel
    machines = in_one_machine(job.hardware, ranks)
    hardware = replace(searched_on(machines[0], machines), tensor_parallel=1)
    return replace(job, hardware=hardware, part=Slice(0, ranks))
