"""What a step costs beside its work: the real executor driven through a real job whose actions do nothing; and what an
operator costs the host that issues it to an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flexgen_bench.calibrate.effort import Effort
from flexgen_bench.calibrate.matrix import tiny_layer
from flexgen_bench.calibrate.site import ProbeMemory, Site
from flexgen_bench.calibrate.stable import Probe
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.tiers import Lane
from flexgen_bench.engine.executor import Executor
from flexgen_bench.models.model import Model
from flexgen_bench.planner.memory_plan import plan_job
from flexgen_bench.schedule.scheduled_job import ScheduledJob
from flexgen_bench.schedule.scheduler import Scheduler
from flexgen_bench.schedule.sequence_groups import Request
from flexgen_bench.schedule.steps import Step

LAYERS, BATCH_SIZE, BATCHES = 24, 8, 4


def step_probe(site: Site, effort: Effort) -> Probe:
    """``<tier>.step``: steps per second of a whole job, generating them included. (In ``Rates`` its inverse.)"""
    counted = _run(site, effort.step_passes)
    return Probe(f"{site.tier}.step", counted, lambda: _run(site, effort.step_passes))


def operator_probe(memory_of_site: ProbeMemory) -> Probe:
    """``<tier>.operator``: operators per second of layers too small to keep a device busy, issued one after the other.
    (In ``Rates`` its inverse.)"""
    site, layer = memory_of_site.site, tiny_layer(memory_of_site)
    return Probe(f"{site.tier}.operator", _operators(layer), layer, site.settle)


def _operators(call: Callable[[], object]) -> int:
    """How many a call issues."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.number += 1
            return func(*args, **(kwargs or {}))

    with Counting() as mode:  # type: ignore[no-untyped-call]
        call()
    number: int = mode.number
    return number


def _scheduler(hardware: HardwareProfile, passes: int) -> tuple[Scheduler, ScheduledJob]:
    """A block of sequences, half of the weights on disk."""
    shape = ModelShape(
        name="steps",
        family="opt",
        num_layers=LAYERS,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        ffn_size=256,
        vocab_size=64,
        max_positions=64,
        tied_embeddings=True,
    )
    dtype, near = DType.FLOAT16, Placement.all_on(hardware.compute_tier)
    policy = Policy(
        gpu_batch_size=BATCH_SIZE,
        num_gpu_batches=BATCHES,
        weights=Placement(cpu=0.5, disk=0.5),
        kv_cache=near,
        activations=near,
    )
    plan = plan_job(Model.of(shape, dtype), policy, hardware, [Request(8, passes)] * policy.block_size)
    return Scheduler(policy, plan), plan.job


def _nothing(step: Step) -> None:
    """The action of every step."""


def _run(site: Site, passes: int) -> int:
    """The job as the engine drives it; the number of its steps."""
    running, job = _scheduler(site.device.hardware, passes)
    executor = Executor(site.device.lane_settings())
    try:
        return drive(running, job, executor)
    finally:
        executor.close()


def drive(running: Scheduler, job: ScheduledJob, executor: Executor) -> int:
    """All passes, as the engine drives them, with actions that do nothing; the number of steps."""
    count = 0
    while not running.is_done:
        ends: dict[int, tuple[Lane, int]] = {}
        for step in running.steps(running.schedule()):
            ticket = executor.submit(step, _nothing)
            count += 1
            if step.lane.computes:
                ends[step.unit] = ticket
        for ticket in ends.values():
            executor.wait([ticket])
        executor.collect()
        running.postprocess()
    executor.drain()
    return count
