"""What the executor itself costs per step: the steps of real jobs with actions that do nothing.

``python benchmarks/step_overhead.py [--rounds 7] [--out results/benchmarks/step_overhead.json]``

The steps come from the generator, for OPT-6.7B's shape under policies that use different lanes, and are driven as the
engine drives them: pass by pass, waiting for the last compute step of every unit. Per step: ``wall`` of the whole job,
``generate`` (making the steps), ``submit`` (queueing them while every lane is held back) and ``execute`` (letting the
lanes run what is queued). Rounds are interleaved, so that a busy neighbour disturbs every setting.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flexgen_bench.config import model_spec
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import AttentionSite, Placement, Policy
from flexgen_bench.core.tiers import Lane
from flexgen_bench.core.units import GIB
from flexgen_bench.engine.executor import Executor, LaneSettings
from flexgen_bench.models.registry import family
from flexgen_bench.planner.memory_plan import Request, form_batches, plan_block
from flexgen_bench.planner.units import pack
from flexgen_bench.schedule.generator import pass_steps
from flexgen_bench.schedule.job import Job, Work
from flexgen_bench.schedule.steps import Step, StepKind
from flexgen_bench.schedule.weights import WeightStream

PASSES, BATCHES, BATCH_SIZE = 8, 4, 8
HOST = HardwareProfile("host", Accelerator.NONE)
EMULATED = HardwareProfile("emulated", Accelerator.EMULATED, gpu_memory_bytes=16 * GIB)
JOBS: dict[str, tuple[HardwareProfile, dict[str, Any]]] = {
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


def job_of(hardware: HardwareProfile, choices: dict[str, Any]) -> Job:
    """One block of OPT-6.7B's shape."""
    shape, dtype = model_spec("opt-6.7b").shape, DType.FLOAT16
    policy = Policy(gpu_batch_size=BATCH_SIZE, num_gpu_batches=BATCHES, **choices)
    requests = [Request(32, PASSES)] * policy.block_size
    batches = form_batches(requests, range(len(requests)), policy)
    packed = pack(shape, family(shape.family).inventory(shape), dtype)
    return plan_block(shape, packed, dtype, policy, hardware, batches).job


def passes(job: Job) -> Iterator[Iterator[Step]]:
    """The job's steps, one iterator per pass."""
    weights = WeightStream(job)
    for token in range(PASSES):
        work = [Work(batch, token, i % job.stages) for i, batch in enumerate(job.batches)]
        yield pass_steps(job, weights, token, work, token == PASSES - 1)


def nothing(step: Step) -> None:
    """The action of every step."""


def run(job: Job, overlap: bool) -> tuple[float, int]:
    """Drive a whole job as the engine does; seconds and steps."""
    executor, count = Executor(settings(), overlap), 0
    start = time.perf_counter()
    for steps in passes(job):
        ends: dict[int, tuple[Lane, int]] = {}
        for step in steps:
            ticket = executor.submit(step, nothing)
            count += 1
            if step.lane in (job.compute_lane, Lane.CPU):
                ends[step.unit] = ticket
        for ticket in ends.values():
            executor.wait([ticket])
        executor.collect()
    executor.drain()
    seconds = time.perf_counter() - start
    executor.close()
    return seconds, count


def in_parts(job: Job) -> tuple[float, float, float]:
    """Seconds to make all steps, to queue them while every lane is held back, and to execute what is queued."""
    start = time.perf_counter()
    steps = [step for part in passes(job) for step in part]
    made = time.perf_counter() - start
    executor, gate = Executor(settings()), threading.Event()
    for lane in Lane:
        executor.submit(Step(lane, StepKind.SAMPLE, 0), lambda step: gate.wait() and None)
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
    return {lane: LaneSettings() for lane in Lane}


def measure(rounds: int) -> list[dict[str, Any]]:
    """Per job and figure: microseconds per step, one value per round."""
    jobs = {name: job_of(*choices) for name, choices in JOBS.items()}
    rows: list[dict[str, Any]] = [{"job": name} for name in jobs]
    taken: list[dict[str, list[float]]] = [
        {name: [] for name in ("wall", "wall_no_overlap", "generate", "submit", "execute")}
        for _ in jobs
    ]
    for _ in range(rounds):
        for row, lists, job in zip(rows, taken, jobs.values(), strict=True):
            wall, count = run(job, overlap=True)
            serial, _ = run(job, overlap=False)
            row["steps"] = count
            for name, seconds in zip(lists, (wall, serial, *in_parts(job)), strict=True):
                lists[name].append(round(seconds / count * 1e6, 2))
    return [row | {"us_per_step": lists} for row, lists in zip(rows, taken, strict=True)]


def show(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        print(f"{row['job']}: {row['steps']} steps")
        for name, values in row["us_per_step"].items():
            low, high = min(values), max(values)
            print(f"  {name:16} {statistics.median(values):6.1f} us/step ({low:.1f} to {high:.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = measure(options.rounds)
    show(rows)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"evidence": "MEASURED", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
