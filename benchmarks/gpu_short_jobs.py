"""The jobs of a short stay on a GPU that is held to 16 GB: which model, under which policy, of what size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from engine_runs import Shape

from flexgen_bench.config.build import model_spec
from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.policy import AttentionSite, Placement, Policy
from flexgen_bench.core.tiers import Tier

GPU, CPU = Placement.all_on(Tier.GPU), Placement.all_on(Tier.CPU)
FOUR = Compression(4)
# What the planner finds for 64 prompts of 512 + 32 tokens on conf/gpu/h100-16gb.yaml (SIMULATED 634 tokens/s).
RESIDENT = Policy(7, 1, GPU, GPU, GPU, prefill_chunk=896)
ATTENDED = Policy(16, 2, GPU, CPU, GPU, attention=AttentionSite.CPU, prefill_chunk=4096)
# Streamed weights, the cache attended to where it lies: of two micro-batches, one is computed while the cpu attends.
STREAMED = Policy(24, 2, CPU, CPU, CPU, prefetch=3, attention=AttentionSite.CPU, prefill_chunk=4096)
# Cores that are left to the lanes that issue.
THREADS = (0, 2, 4)
# Its published batch, and larger ones up to the largest that its memory model lets fit.
ORIGINAL_BATCHES = (2, 3, 6)


@dataclass(frozen=True)
class GpuJob:
    """all_layers: of the model, where ``model`` has only some of them (0: it has all). policies: of a job that is run
    under several."""

    model: ModelSpec
    policy: Policy
    size: Shape
    all_layers: int = 0
    policies: Mapping[str, Policy] = field(default_factory=dict)


def some_layers(name: str, layers: int) -> ModelSpec:
    spec = model_spec(name)
    return replace(spec, shape=replace(spec.shape, name=f"{name}-{layers}", num_layers=layers))


LAYER = GpuJob(some_layers("opt-6.7b", 12), RESIDENT, Shape(7, 512, 32))
JOBS: Mapping[str, GpuJob] = {
    "threads": GpuJob(some_layers("opt-6.7b", 12), ATTENDED, Shape(32, 512, 8)),
    "resident": GpuJob(model_spec("opt-6.7b"), RESIDENT, Shape(64, 512, 32)),
    "4bit": GpuJob(
        model_spec("opt-6.7b"), Policy(32, 1, GPU, GPU, GPU, prefill_chunk=2048, lossy=Lossy(FOUR)), Shape(64, 512, 32)
    ),
    "30b": GpuJob(model_spec("opt-30b"), STREAMED, Shape(48, 512, 32)),
    "175b": GpuJob(
        some_layers("opt-175b", 12),
        replace(STREAMED, gpu_batch_size=8, lossy=Lossy(FOUR, FOUR), prefetch=2),
        Shape(16, 512, 32),
        all_layers=96,
    ),
    "tokens": GpuJob(
        model_spec("opt-125m"),
        RESIDENT,
        Shape(8, 64, 24),
        policies={
            "resident": Policy(4, 2, GPU, GPU, GPU),
            "weights moved": Policy(4, 2, CPU, GPU, GPU),
            "cache moved": Policy(4, 2, GPU, CPU, CPU),
            "attended by the cpu": Policy(4, 2, CPU, CPU, CPU, attention=AttentionSite.CPU),
        },
    ),
}


def quick_job(job: GpuJob) -> GpuJob:
    """The same kind of job on a tiny model."""
    shape = ModelShape(
        name="gpu-short",
        family="opt",
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        ffn_size=128,
        vocab_size=128,
        max_positions=64,
        tied_embeddings=True,
    )
    policy = replace(job.policy, gpu_batch_size=2, num_gpu_batches=1, prefill_chunk=8)
    policies = {name: replace(one, gpu_batch_size=2) for name, one in job.policies.items()}
    return GpuJob(ModelSpec(shape), policy, Shape(4, 8, 4), 4 * bool(job.all_layers), policies)
