"""The competitors' models on hosts without a GPU: what budgets are held against."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flexgen_bench.config.build import hardware_profile
from flexgen_bench.core.compression import EXACT, Compression, Lossy
from flexgen_bench.core.errors import CannotRun, DoesNotFit
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.rates import Rates, SiteRates
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import GIB
from flexgen_bench.planner.predictor import make_predictor
from tests.baselines.test_baseline_predictors import configured, predict

ROWS = (1, 32, 256)


def products(**gflops: float) -> dict[str, Any]:
    """The same rate at every number of rows."""
    return {dtype: {2048: dict.fromkeys(ROWS, rate * 1e9)} for dtype, rate in gflops.items()}


# Two cores with AVX2: our kernels read bfloat16 as fast as float32, torch's products of bfloat16 take ten times as long
# (docs/notes/cpu_products.md).
AVX2 = HardwareProfile(
    "avx2",
    Accelerator.NONE,
    cpu_memory_bytes=int(2.25 * GIB),
    disk_bytes=10**12,
    links={"disk_read": 2e9, "disk_write": 2e9},
    rates=Rates(
        {
            Tier.CPU: SiteRates(
                matrix=products(float32=150, bfloat16=158),
                memory=18e9,
                prefill_attention={128: 4e10},
                decode_attention={"float32": {1: 1e10}, "bfloat16": {1: 1e10}},
                unpack=5e9,
                step=3e-5,
                torch_matrix=products(float32=140, bfloat16=14),
            )
        }
    ),
)
JOB = {"hardware": AVX2, "num_prompts": 32, "options": {"offload": "disk"}}


def test_accelerate_computes_with_torch_and_not_with_our_kernels() -> None:
    """On a processor without bfloat16 instructions it made 5 to 7 prompt tokens a second; 150 were predicted, from our
    kernels' rates."""
    slow = predict("accelerate", "opt-1.3b", 32, 4, dtype=DType.BFLOAT16, **JOB)
    assert slow.prefill_tok_per_s == pytest.approx(5.5, abs=1)
    quick = predict("accelerate", "opt-1.3b", 32, 4, dtype=DType.FLOAT32, **JOB)
    assert quick.prefill_tok_per_s is not None
    assert quick.prefill_tok_per_s > 5 * slow.prefill_tok_per_s  # type: ignore[operator]


def test_a_process_without_cuda_is_small() -> None:
    """MEASURED: it runs under a cap of 2.25 GiB. With the 3 GB of a process that uses a GPU it was said not to fit."""
    found = predict("accelerate", "opt-1.3b", 32, 4, dtype=DType.BFLOAT16, **JOB)
    assert found.batch_size == 32
    assert found.bytes["cpu"] < AVX2.cpu_memory_bytes  # type: ignore[operator]
    tiny = replace(AVX2, cpu_memory_bytes=GIB // 2)
    with pytest.raises(DoesNotFit):
        predict("accelerate", "opt-1.3b", 32, 4, dtype=DType.BFLOAT16, **JOB | {"hardware": tiny})


@pytest.mark.parametrize("name", ["transformers", "deepspeed"])
def test_the_others_compute_with_torch_as_well(name: str) -> None:
    roomy = replace(AVX2, cpu_memory_bytes=32 * GIB)
    times = [
        predict(name, "opt-1.3b", 32, 4, dtype=dtype, hardware=roomy, num_prompts=8).prefill_s
        for dtype in (DType.BFLOAT16, DType.FLOAT32)
    ]
    assert times[0] > 5 * times[1]


def test_without_rates_of_torch_those_of_the_layers_are_taken() -> None:
    """As profiles in conf/gpu state them: nothing about the tables of the paper changes."""
    assert AVX2.rates is not None
    site = replace(AVX2.rates.sites[Tier.CPU], torch_matrix={})
    plain = replace(AVX2, rates=Rates({Tier.CPU: site}))
    found = predict("accelerate", "opt-1.3b", 32, 4, dtype=DType.BFLOAT16, **JOB | {"hardware": plain})
    slow = predict("accelerate", "opt-1.3b", 32, 4, dtype=DType.BFLOAT16, **JOB)
    assert found.prefill_s < slow.prefill_s / 4


# Llama of 1.2e9 weights (benchmarks/cpu_products.py) on two cores with AVX2 and a disk of 2 GB/s.
LLAMA = ModelShape("llama-1.2b", "llama", 16, 2048, 32, 8, 64, 8192, 49152, 8192, False)


def llama_cpp(memory_bytes: int, num_prompts: int = 32, bits: int | None = None, **options: Any) -> Prediction:
    conf = configured("llama_cpp")
    hardware = replace(AVX2, cpu_memory_bytes=memory_bytes)
    lossy = Lossy(weights=Compression(bits)) if bits else EXACT
    job = replace(Job(LLAMA, DType.BFLOAT16, hardware, 32, 32, num_prompts), lossy=lossy)
    return make_predictor(conf["predictor"], conf["constants"], {**conf["options"], **options}).predict(job)


@pytest.mark.parametrize(
    ("memory", "options", "measured"),
    [
        (8 * GIB, {}, 24.1),
        (8 * GIB, {"bits": 4}, 26.0),
        (8 * GIB, {"num_prompts": 1}, 6.75),
        (8 * GIB, {"num_prompts": 1, "bits": 4}, 17.1),
        (int(1.5 * GIB), {}, 9.9),
    ],
)
def test_llama_cpp_on_two_cores(memory: int, options: dict[str, Any], measured: float) -> None:
    """MEASURED on such a machine (docs/notes/llama_cpp.md): what three constants were fitted to, and what follows."""
    found = llama_cpp(memory, **options)
    assert found.tok_per_s == pytest.approx(measured, rel=0.3)
    assert found.settings["load"] == ("mmap" if memory < 2 * GIB else "resident")


def test_llama_cpp_reads_mapped_weights_again_on_every_pass() -> None:
    tight, roomy = llama_cpp(int(1.5 * GIB)), llama_cpp(8 * GIB, load="mmap")
    assert tight.bottleneck == "disk_read: weights"
    passes = 1 + 31  # all prompts are computed together, of 2048 tokens at most
    assert tight.lane_busy_s["disk_read"] == pytest.approx(passes * 2.24e9 / (0.65 * 2e9), rel=0.1)
    assert "disk_read" not in roomy.lane_busy_s  # in memory after the first pass
    with pytest.raises(DoesNotFit):
        llama_cpp(GIB, load="resident")


def test_llama_cpp_puts_as_many_layers_on_a_gpu_as_fit() -> None:
    shares = []
    for name in ("t4", "rtx3090", "rtx4090", "h100"):
        found = predict("llama_cpp", "llama-2-13b", 512, 32, hardware=hardware_profile(name), num_prompts=32)
        shares.append(found.settings["gpu_layers"])
        assert found.bytes["gpu"] <= hardware_profile(name).gpu_memory_bytes  # type: ignore[operator]
    assert 0 < shares[0] < shares[1] <= shares[2] <= shares[3] == 41
    cpu_too = predict("llama_cpp", "llama-2-13b", 512, 32, num_prompts=1)
    assert {"cpu", "gpu"} <= set(cpu_too.lane_busy_s)  # one sequence: the rest is computed by the cpu
    together = predict("llama_cpp", "llama-2-13b", 512, 32, num_prompts=64, options={"batch_size": 64})
    assert together.lane_busy_s["h2d"] > 0  # 64 rows: the rest is copied
    with pytest.raises(CannotRun, match="OPT"):
        predict("llama_cpp", "opt-1.3b", 32, 4, num_prompts=2)
