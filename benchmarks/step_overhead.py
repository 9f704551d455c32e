"""What the executor itself costs per step: the steps of real jobs with actions that do nothing.

``python benchmarks/step_overhead.py [--quick] [--rounds 7] [--out results/benchmarks/step_overhead.json]``

The steps come from the generator, for a model's shape (nothing is loaded) under policies that use different lanes, and
are driven as the engine drives them: pass by pass, waiting for the last compute step of every unit. Per step: ``wall``
of the whole job,
``generate`` (making the steps), ``submit`` (queueing them while every lane is held back) and ``execute`` (letting the
lanes run what is queued). Rounds are interleaved, so that a busy neighbour disturbs every setting.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from common import Bar, Report, median, options

from flexgen_bench.calibrate.steps import drive
from flexgen_bench.config.build import model_spec
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import AttentionSite, Placement, Policy
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.tiers import Lane, Site
from flexgen_bench.core.units import GIB
from flexgen_bench.engine.executor import Executor, LaneSettings
from flexgen_bench.models.model import Model
from flexgen_bench.planner.memory_plan import plan_job
from flexgen_bench.schedule.scheduled_job import ScheduledJob
from flexgen_bench.schedule.scheduler import Scheduler
from flexgen_bench.schedule.sequence_groups import Request
from flexgen_bench.schedule.steps import Step, StepKind

LIMIT_US = 60
PASSES, BATCHES, BATCH_SIZE = 8, 4, 8
HOST = HardwareProfile("host", Accelerator.NONE)
EMULATED = HardwareProfile("emulated", Accelerator.EMULATED, gpu_memory_bytes=16 * GIB)
Choices = tuple[HardwareProfile, dict[str, Any]]
JOBS: dict[str, Choices] = {
    "weights on disk, cpu computes": (HOST, {"weights": Placement(cpu=0.5, disk=0.5)}),
    "weights on cpu and disk, cpu attends, gpu computes": (
        EMULATED,
        {
            "weights": Placement(gpu=0.25, cpu=0.5, disk=0.25),
            "kv_cache": Placement(gpu=0.5, cpu=0.5),
            "attention": AttentionSite.CPU,
        },
    ),
}


def scheduler(model: str, choices: Choices) -> tuple[Scheduler, ScheduledJob]:
    """One block of a model's shape."""
    hardware, chosen = choices
    shape, dtype = model_spec(model).shape, DType.FLOAT16
    policy = Policy(gpu_batch_size=BATCH_SIZE, num_gpu_batches=BATCHES, **chosen)
    requests = [Request(32, PASSES)] * policy.block_size
    plan = plan_job(Model.of(shape, dtype), policy, hardware, requests)
    return Scheduler(policy, plan), plan.job


def passes(running: Scheduler) -> Iterator[Iterator[Step]]:
    """The job's steps, one iterator per pass."""
    while not running.is_done:
        yield running.steps(running.schedule())
        running.postprocess()


def nothing(step: Step) -> None:
    """The action of every step."""


def _hold(gate: threading.Event) -> None:
    gate.wait()


def run(model: str, choices: Choices, overlap: bool) -> tuple[float, int]:
    """Drive a whole job as the engine does; seconds and steps."""
    running, job = scheduler(model, choices)
    executor = Executor(settings(), overlap)
    start = time.perf_counter()
    count = drive(running, job, executor)
    seconds = time.perf_counter() - start
    executor.close()
    return seconds, count


def in_parts(model: str, choices: Choices) -> tuple[float, float, float]:
    """Seconds to make all steps, to queue them while every lane is held back, and to execute what is queued."""
    running, _ = scheduler(model, choices)
    start = time.perf_counter()
    steps = [step for part in passes(running) for step in part]
    made = time.perf_counter() - start
    executor, gate = Executor(settings()), threading.Event()
    for lane in Site.GPU.lanes:
        executor.submit(Step(lane, StepKind.SAMPLE, 0), lambda step: _hold(gate))
    start = time.perf_counter()
    for step in steps:
        executor.submit(step, nothing)
    submitted = time.perf_counter() - start
    start = time.perf_counter()
    gate.set()
    executor.drain()
    executed = time.perf_counter() - start
    executor.close()
    return made, submitted, executed


def settings() -> dict[Lane, LaneSettings]:
    return {lane: LaneSettings() for lane in Site.GPU.lanes}


def one_round(model: str, choices: Choices) -> dict[str, float]:
    """Every figure once: microseconds per step."""
    wall, count = run(model, choices, overlap=True)
    serial, _ = run(model, choices, overlap=False)
    made, submitted, executed = in_parts(model, choices)
    seconds = {"wall": wall, "wall_no_overlap": serial, "generate": made, "submit": submitted, "execute": executed}
    return {"steps": count} | {name: round(s / count * 1e6, 2) for name, s in seconds.items()}


def main() -> int:
    opts = options(__doc__, rounds=7)
    report = Report("step_overhead", Evidence.MEASURED, opts)
    for _ in range(opts.rounds):
        report.rounds.append({name: one_round(opts.model, choices) for name, choices in JOBS.items()})
    report.settings = {"passes": PASSES, "batches": BATCHES, "unit": "us per step"}
    for name in JOBS:
        taken = {key: [of_round[name][key] for of_round in report.rounds] for key in report.rounds[0][name]}
        walls = tuple(wall / LIMIT_US for wall in taken["wall"])
        bar = Bar(name, f"{LIMIT_US} us", f"{median(taken['wall']):.1f} us", walls, 1.0, at_most=True)
        report.bars.append(bar)
        parts = [f"{key} {median(values):.1f}" for key, values in taken.items() if key != "steps"]
        report.where_time_goes.append(f"{name}: us per step, median: {', '.join(parts)}")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
