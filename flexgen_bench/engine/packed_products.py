"""Passes in which an accelerator multiplies with compressed weights as they lie, instead of unpacking them first.

The planner does not know of them: a plan has room for unpacked weights, which passes of many rows need, and prices
passes as if all of them unpacked.
"""

from __future__ import annotations

from dataclasses import replace

from flexgen_bench.engine.device import Device
from flexgen_bench.memory.weight_store import TORCH_DTYPES
from flexgen_bench.planner.memory_plan import MemoryPlan


def with_packed_products(plan: MemoryPlan, device: Device) -> MemoryPlan:
    """The plan, with ``ScheduledJob.packed_rows`` as this device has them."""
    weights = plan.policy.lossy.weights
    if weights is None or not any(unit.unpack for unit in plan.job.units):
        return plan
    rows = device.packed_rows(weights, TORCH_DTYPES[plan.model.dtype])
    return replace(plan, job=replace(plan.job, packed_rows=rows)) if rows else plan


def weights_path(plan: MemoryPlan) -> str:
    """How compressed weights are used, in words, for the record of a run; empty if there are none to unpack."""
    if not any(unit.unpack for unit in plan.job.units):
        return ""
    rows = plan.job.packed_rows
    if not rows:
        return "; compressed weights: unpacked in every pass"
    return f"; compressed weights: multiplied as they are in passes of up to {rows} rows, unpacked in others"
