"""What only a CUDA device can show: the same tokens there, no copy or wait that stalls a pass, memory that is given
back.

Run by ``scripts/gpu_check.sh tests``; skipped without a device. float32 without TF32, so that tokens are those of the
processor.
"""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.instructions import GRAPHS_SWITCH
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import AttentionSite, Placement, Policy
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import MIB
from flexgen_bench.engine import static_decode
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.memory import host
from flexgen_bench.planner.graph_memory import graph_bytes
from tests.engine.test_engine_tokens import GPU_MIXES, NEW_TOKENS, Reference, on, reference_of, run
from tests.engine.test_engine_tokens import reference as reference  # noqa: PLC0414  (a fixture)
from tests.engine.test_shared_prompts import prompts_with
from tests.support.tiny_models import greedy_reference, random_model, random_prompts, save

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]

CUDA = HardwareProfile("cuda", Accelerator.CUDA)
MIX_NAMES = ["gpu", "cpu", "disk", "thirds", "gpu+disk"]
# cuBLAS keeps a workspace for each stream and handle, up to 32 MiB on recent GPUs.
WORKSPACES = 4 * 32 * MIB


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "serial"])
@pytest.mark.parametrize("attention", AttentionSite)
@pytest.mark.parametrize("everything", GPU_MIXES, ids=MIX_NAMES)
def test_tokens(
    reference: Reference, everything: Placement, attention: AttentionSite, overlap: bool, tmp_path: Path
) -> None:
    policy = Policy(2, 3, everything, everything, everything, attention=attention, overlap=overlap)
    assert run(reference, policy, CUDA, tmp_path)[0] == reference.tokens


@pytest.mark.parametrize("batches", [(7, 1), (3, 3)], ids=["one micro-batch", "several"])
@pytest.mark.parametrize("weights", [on(Tier.GPU), Placement(gpu=0.5, cpu=0.5)], ids=["resident", "half moved"])
def test_decode_passes_are_launched_as_graphs(
    reference: Reference, weights: Placement, batches: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recorded while other lanes copy and allocate, in several lengths."""
    decoder = reference.weights.family.decoder(reference.weights.shape)
    if any(not layer.attention.mod.is_none for layer in decoder.layers):
        pytest.skip("scores are changed: not recorded")
    monkeypatch.setattr(static_decode, "REACH", 8)
    tokens, result = run(reference, Policy(*batches, weights, on(Tier.GPU), on(Tier.GPU)), CUDA, tmp_path)
    assert tokens == reference.tokens
    assert "CUDA graphs, launched" in result.decode_path, result.decode_path


@pytest.mark.parametrize("seed", range(8))
def test_random_policies(reference: Reference, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"{reference.weights.shape.family}{seed}")
    policy = Policy(
        gpu_batch_size=rng.choice([1, 2, 3, 7, 20]),
        num_gpu_batches=rng.choice([1, 2, 3]),
        weights=rng.choice(GPU_MIXES),
        kv_cache=rng.choice(GPU_MIXES),
        activations=rng.choice(GPU_MIXES),
        prefetch=rng.choice([1, 2, 3, 9]),
        attention=rng.choice(list(AttentionSite)),
    )
    assert run(reference, policy, CUDA, tmp_path)[0] == reference.tokens, policy


@pytest.mark.parametrize("name", ["opt", "llama-tied-grouped"])
def test_prompts_that_begin_alike(name: str, tmp_path: Path) -> None:
    """What they share is written to every cache and read from there, under a mask that the flash kernel does not
    take."""
    reference = reference_of(name, prompts_with(14, [1, 20, 2, 9, 9, 17, 5]), tmp_path)
    for everything in GPU_MIXES:
        for chunk in (None, 3, 20):
            policy = Policy(3, 2, everything, everything, everything, prefill_chunk=chunk)
            assert run(reference, policy, CUDA, tmp_path)[0] == reference.tokens, policy


@pytest.mark.parametrize("attention", AttentionSite)
def test_tokens_when_torch_must_reuse_memory_at_once(
    reference: Reference, attention: AttentionSite, tmp_path: Path
) -> None:
    """With little memory to spare a tensor's place is taken as soon as torch believes it free: one that another stream
    still reads would be overwritten."""
    policy = Policy(1, 7, *[Placement(0.4, 0.3, 0.3)] * 3, prefetch=3, attention=attention)
    run(reference, policy, CUDA, tmp_path)  # workspaces and everything else that stays
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_reserved() + WORKSPACES + 64 * MIB
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    for _ in range(5):
        assert run(reference, policy, CUDA, tmp_path)[0] == reference.tokens


def model_of_some_size(folder: Path) -> Reference:
    """Some MiB a layer, so that a plan is more than the rounding of its parts."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        ffn_dim=2048,
        word_embed_proj_dim=512,
        vocab_size=8192,
        max_position_embeddings=512,
    )
    checkpoint = save(OPTForCausalLM(config).eval(), folder / "ckpt")
    weights = PackedWeights.from_checkpoint(checkpoint, DType.FLOAT32, folder / "cache")
    return Reference(weights, random_prompts([128] * 12), [])


@pytest.mark.parametrize("attention", AttentionSite)
@pytest.mark.parametrize("kv", [on(Tier.GPU), on(Tier.CPU)], ids=["kv-gpu", "kv-cpu"])
def test_no_more_memory_than_planned(attention: AttentionSite, kv: Placement, tmp_path: Path) -> None:
    sized = model_of_some_size(tmp_path)
    policy = Policy(4, 3, Placement(gpu=0.5, cpu=0.5), kv, kv, attention=attention)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, result = run(sized, policy, CUDA, tmp_path)
    assert result.plan is not None
    planned = result.plan.total(Tier.GPU) + graph_bytes(result.plan)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= planned * 1.05 + WORKSPACES, f"{used / MIB:.0f} MiB of {planned / MIB:.0f} planned"


def test_memory_is_given_back(reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host, where it is locked, and on the GPU; job after job."""

    class Counted(host._Region):
        alive: ClassVar[int] = 0

        def __init__(self, *_: Any, **__: Any) -> None:
            Counted.alive += 1

        def __del__(self) -> None:
            super().__del__()
            Counted.alive -= 1

    monkeypatch.setattr(host, "_Region", Counted)
    policy = Policy(2, 3, *[Placement(0.4, 0.3, 0.3)] * 3)
    run(reference, policy, CUDA, tmp_path)
    gc.collect()
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        run(reference, policy, CUDA, tmp_path)
        gc.collect()
        assert Counted.alive == 0
        assert torch.cuda.memory_allocated() <= held


def runtime_events(reference: Reference, policy: Policy, folder: Path, tokens: int) -> Counter[str]:
    """How often each CUDA call and each kind of copy happened in a job of ``tokens`` passes."""
    from torch.profiler import ProfilerActivity, profile

    both = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=both, acc_events=True) as profiler:
        run(reference, policy, CUDA, folder, new_tokens=tokens)
    return Counter({event.key: event.count for event in profiler.key_averages()})


@pytest.mark.parametrize("attention", AttentionSite)
@pytest.mark.parametrize("everything", GPU_MIXES[:4], ids=MIX_NAMES[:4])
def test_a_pass_neither_copies_pageable_memory_nor_waits_for_the_device(
    everything: Placement, attention: AttentionSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of different lengths differ by passes alone: what grows with the length happens inside a pass. A copy from
    or to pageable memory makes the issuing thread wait, a synchronisation every lane. (Recording a graph takes memory,
    once.)"""
    monkeypatch.setenv(GRAPHS_SWITCH, "0")
    model = random_model("opt")
    prompts = random_prompts([9, 5, 12, 7])
    weights = PackedWeights.from_checkpoint(save(model, tmp_path / "ckpt"), DType.FLOAT32, tmp_path / "cache")
    tiny = Reference(weights, prompts, greedy_reference(model, prompts, NEW_TOKENS))
    policy = Policy(2, 2, everything, everything, everything, attention=attention)
    run(tiny, policy, CUDA, tmp_path)  # what happens once per process
    short = runtime_events(tiny, policy, tmp_path, 3)
    long = runtime_events(tiny, policy, tmp_path, NEW_TOKENS)
    if not any(name.startswith("cudaLaunchKernel") for name in long):
        pytest.skip("the profiler sees no CUDA calls here")
    grown = {name: long[name] - short[name] for name in long if long[name] > short[name]}
    stalls = {
        name: count
        for name, count in grown.items()
        if "Pageable" in name
        or name in ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaMalloc", "cudaFree", "cudaHostAlloc")
    }
    assert not stalls, f"in {NEW_TOKENS - 3} passes more: {stalls}"
