"""One step of a short stay on a GPU: policies are stated, nothing is searched for or calibrated.

``python benchmarks/gpu_short.py STEP --out FILE [--quick] [--cache FOLDER]``; ``scripts/gpu_check.sh --budget`` runs
them one after the other. What a step finds goes into FILE under its name, beside what the others found: all of them
make one file. Each process is held to the 16 GB of the paper's GPU. ``--quick``: tiny models on the emulated
accelerator, to see that everything works.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from common import Options
from engine_runs import Measured, Shape, engine, predicted, run
from gpu_rates import Bench, packed_products
from gpu_short_jobs import JOBS, LAYER, ORIGINAL_BATCHES, THREADS, GpuJob, quick_job
from hydra import initialize_config_dir

from flexgen_bench.cells.compose import composed
from flexgen_bench.checkpoints import dummy_weights
from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.config.build import cell_spec, hardware_profile
from flexgen_bench.config.paths import conf_dir, default_cache_dir
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.errors import CannotRun, UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.instructions import GRAPHS_SWITCH
from flexgen_bench.core.model import DType
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.units import GIB
from flexgen_bench.engine import device as device_module
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.machine.host import physical_cores
from flexgen_bench.runner.gpu_cap import apply_gpu_cap

PROFILE = "h100-16gb"  # whose predictions stand beside what is measured
Found = dict[str, Any]


@dataclass(frozen=True)
class Here:
    """Where a step runs."""

    quick: bool
    cache: Path
    hardware: HardwareProfile

    @property
    def evidence(self) -> Evidence:
        return Evidence.EMULATED if self.quick else Evidence.MEASURED

    def options(self, threads: int | None = None) -> Options:
        return Options(self.quick, 1, threads or (1 if self.quick else physical_cores()), None, self.cache)

    def job(self, job: GpuJob) -> GpuJob:
        return quick_job(job) if self.quick else job

    def weights(self, job: GpuJob) -> PackedWeights:
        """Layers that repeat the first one: the disk holds it once, memory all of them."""
        folder = prepare_checkpoint(job.model, DType.FLOAT16, self.cache, lambda *_: None)
        compression = job.policy.lossy.weights
        return PackedWeights.from_checkpoint(folder, DType.FLOAT16, self.cache, lambda *_: None, compression)


def measured(here: Here, job: GpuJob, weights: PackedWeights, threads: int | None = None) -> Found:
    """A job after a short one that warms up, with what was predicted for it."""
    with engine(weights, job.policy, here.hardware, here.options(threads)) as made:
        vocab = job.model.shape.vocab_size
        run(made, replace(job.size, gen_len=3), vocab)
        found = run(made, job.size, vocab)
    return {"evidence": str(here.evidence), **_times(found, job.size)} | _prediction(here, job, weights)


def _times(found: Measured, size: Shape) -> Found:
    seconds = found.prefill_s + found.decode_s
    passes = found.pass_s
    return {
        "tok_per_s": size.prompts * size.gen_len / seconds,
        "prefill_s": found.prefill_s,
        "decode_s": found.decode_s,
        "pass_ms": 1000 * statistics.median(passes) if passes else None,
        "lanes": found.to_dict()["lanes"],
    }


def _prediction(here: Here, job: GpuJob, weights: PackedWeights) -> Found:
    """Of this policy on a machine whose constants are stated."""
    stated = hardware_profile(PROFILE)
    times = predicted(weights, job.policy, job.size, replace(stated, gpu_memory_bytes=None))
    tokens = job.size.prompts * job.size.gen_len
    seconds = {"prefill_s": times.prefill_s, "decode_s": times.decode_s}
    return {"policy": to_json(job.policy), "predicted": {**seconds, "tok_per_s": tokens / times.total_s}}


def plain(name: str) -> Callable[[Here], Found]:
    """The step that measures a stated job; of a model with fewer layers than its own, told for all of them."""

    def step(here: Here) -> Found:
        job = here.job(JOBS[name])
        found = measured(here, job, here.weights(job))
        if job.all_layers:
            found["projected"] = {
                "evidence": str(Evidence.PROJECTED),
                "layers": [job.model.shape.num_layers, job.all_layers],
                "tok_per_s": found["tok_per_s"] * job.model.shape.num_layers / job.all_layers,
            }
        return found

    return step


def layer(here: Here) -> Found:
    """A few resident layers, issued one operator after the other and as CUDA graphs."""
    job, found = here.job(LAYER), {}
    weights = here.weights(job)
    with switched(GRAPHS_SWITCH, "0"):
        found["eager"] = measured(here, job, weights) | _profile(here, job, weights)
    with switched(GRAPHS_SWITCH, "1"):
        found["graphed"] = measured(here, job, weights) | _profile(here, job, weights)
    return found


def _profile(here: Here, job: GpuJob, weights: PackedWeights) -> Found:
    """Launches, and what took longest on the device and on the host, of a job of a few passes."""
    from torch.profiler import ProfilerActivity, profile

    few = replace(job.size, gen_len=4)
    activities = [ProfilerActivity.CPU] if here.quick else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with engine(weights, job.policy, here.hardware, here.options()) as made:
        run(made, few, job.model.shape.vocab_size)
        with profile(activities=activities, acc_events=True) as profiled:
            run(made, few, job.model.shape.vocab_size)
    events = profiled.key_averages()
    launches = {e.key: e.count for e in events if "Launch" in e.key}
    device_us = {e.key: getattr(e, "self_device_time_total", 0.0) for e in events}
    host_us = {e.key: e.self_cpu_time_total for e in events}
    return {"profile": {"launches": launches, "device_us": _most(device_us), "host_us": _most(host_us)}}


def _most(times: Mapping[str, float], count: int = 15) -> dict[str, float]:
    return dict(sorted(times.items(), key=lambda one: -one[1])[:count])


def threads(here: Here) -> Found:
    """Attention on the processor, with as many threads as cores and with some cores left to the lanes that issue."""
    job, cores = here.job(JOBS["threads"]), 2 if here.quick else physical_cores()
    weights, found = here.weights(job), {}
    with mock.patch.object(device_module, "threads_beside_a_gpu", lambda threads: threads):
        for left in THREADS:
            count = max(1, cores - left)
            found[str(count)] = measured(here, job, weights, count)
    return found


def original(here: Here) -> Found:
    """FlexGen 0.1.8 at its published batch of 2, and larger ones."""
    found: Found = {}
    for batch in ORIGINAL_BATCHES:
        try:
            found[str(batch)] = _original(here, batch)
        except (CannotRun, UserError, MemoryError, RuntimeError) as error:
            print(f"batch {batch}: skipped, {error}")
            found[str(batch)] = f"skipped: {error}"
    return found


def _original(here: Here, batch: int) -> Found:
    """Two batches of prompts, without a warm-up: its own timer counts what it generates alone."""
    from baselines.flexgen_original.system import FlexGenOriginal
    from flexgen_bench.runner.prompts import build_prompts
    from flexgen_bench.systems.contract import ModelFiles

    if here.quick:
        raise CannotRun("the original FlexGen needs a CUDA device")
    words = ["system=flexgen_original", "model=opt-6.7b", "gpu=gpu16", "dtype=float16", "workload=512-32"]
    words += ["weights=dummy", f"workload.num_prompts={2 * batch}", f"system.options.gpu_batch_size={batch}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        spec = cell_spec(composed(words))
    system = FlexGenOriginal(spec, ModelFiles(here.cache, here.cache, here.cache))
    try:
        system.check()
        system.prepare()
        system.load(batch)
        prompts = build_prompts(spec.workload, here.cache, spec.model.shape)
        generated = system.generate(prompts, spec.workload.gen_len, _silent)
    finally:
        system.close()
    tokens, times = 2 * batch * spec.workload.gen_len, (generated.prefill_s, generated.decode_s)
    named = dict(zip(("prefill_s", "decode_s"), times, strict=True))
    return {"evidence": str(Evidence.MEASURED), "tok_per_s": tokens / sum(times), **named}


def _silent(phase: str, done: int, total: int) -> None:
    """Nobody watches."""


def tokens(here: Here) -> Found:
    """Of a small model in float32, under policies that use every part of a machine, and of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    job, found = here.job(JOBS["tokens"]), {}
    folder = prepare_checkpoint(job.model, DType.FLOAT32, here.cache, lambda *_: None)
    weights = PackedWeights.from_checkpoint(folder, DType.FLOAT32, here.cache, lambda *_: None)
    compute = torch.device("cpu" if here.quick else "cuda")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(compute).eval()
    for name, policy in job.policies.items():
        with engine(weights, policy, here.hardware, here.options()) as made:
            ours = run(made, job.size, job.model.shape.vocab_size)
        expected = _greedy(reference, ours.prompts, job.size.gen_len)
        pairs = zip(ours.tokens, expected, strict=True)
        same = sum(a == b for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))
        found[name] = {"same": same, "of": job.size.prompts * job.size.gen_len}
    return {"evidence": str(here.evidence), "policies": found}


def _greedy(model: Any, prompts: Any, count: int) -> list[list[int]]:
    import torch

    with torch.inference_mode():
        ids = torch.tensor(prompts, device=model.device)
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count, max_new_tokens=count
        )
    return [[int(t) for t in row[len(prompts[0]) :]] for row in made]


def products(here: Here) -> Found:
    """Of few rows with a packed weight."""
    import torch

    bench = Bench(torch.device("cpu" if here.quick else "cuda"), here.cache, here.quick)
    return {"evidence": str(here.evidence), "rows": list(packed_products(bench))}


STEPS: dict[str, Callable[[Here], Found]] = {
    "layer": layer,
    "products": products,
    "threads": threads,
    "resident": plain("resident"),
    "original": original,
    "4bit": plain("4bit"),
    "30b": plain("30b"),
    "tokens": tokens,
    "175b": plain("175b"),
}


@contextlib.contextmanager
def switched(name: str, value: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, {name: value}):
        yield


def machine(quick: bool) -> HardwareProfile:
    if quick:
        links = {"h2d": 100e9, "d2h": 100e9}
        return HardwareProfile("emulated", Accelerator.EMULATED, gpu_memory_bytes=GIB, links=links)
    return hardware_profile("gpu16")


def keep(path: Path, name: str, found: Found) -> None:
    """Into the file that all steps share, whole or not at all."""
    kept: Found = {}
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        kept = json.loads(path.read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(kept | {name: found}, indent=1) + "\n")
    partial.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cache", type=Path, default=default_cache_dir())
    given = parser.parse_args()
    here = Here(given.quick, given.cache, machine(given.quick))
    dummy_weights.REPEATED_FROM_BYTES = 0
    begin = time.perf_counter()
    if not given.quick:
        import torch

        if not torch.cuda.is_available():
            print("error: torch sees no CUDA device", file=sys.stderr)
            return 2
        apply_gpu_cap(here.hardware)
    found = STEPS[given.step](here)
    keep(given.out, given.step, found | {"seconds": time.perf_counter() - begin})
    print(json.dumps(found, indent=1)[:4000])
    return 0


if __name__ == "__main__":
    sys.exit(main())
