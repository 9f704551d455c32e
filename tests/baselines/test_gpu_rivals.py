"""vLLM and KTransformers, which are prepared and have never run: what can be held without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baselines.ktransformers.system import KTransformersSystem
from baselines.ktransformers.system import Settings as KTSettings
from baselines.vllm.system import Settings, VLLMSystem
from flexgen_bench.core.errors import CannotRun, UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.units import GIB
from flexgen_bench.systems.contract import ModelFiles, System
from flexgen_bench.systems.load_system import check_capable
from tests.baselines import test_baselines as shared

CUDA = HardwareProfile("gpu", Accelerator.CUDA, gpu_memory_bytes=16 * GIB, links={"h2d": 1e10, "d2h": 1e10})


def system(kind: type[System], folder: Path, **changes: Any) -> System:
    usual = {"system": "rival", "target": f"{kind.__module__}:{kind.__name__}", "hardware": CUDA}
    spec = replace(shared.spec_of("transformers", "llama"), **(usual | changes))
    return kind(spec, ModelFiles(folder, folder, folder))


def test_vllm_is_told_how_much_to_offload() -> None:
    uva = Settings.of({})
    assert uva.arguments(8 * GIB, 16 * GIB) == {"offload_backend": "uva", "cpu_offload_gb": 0.0}
    assert uva.arguments(30 * GIB, 16 * GIB)["cpu_offload_gb"] == pytest.approx(30 - 0.63 * 16)
    assert Settings.of({"cpu_offload_gb": 4}).arguments(30 * GIB, 16 * GIB)["cpu_offload_gb"] == 4
    ahead = Settings.of({"backend": "prefetch", "group_size": 4, "num_in_group": 3})
    assert ahead.arguments(30 * GIB, 16 * GIB) == {
        "offload_backend": "prefetch",
        "offload_group_size": 4,
        "offload_num_in_group": 3,
    }
    assert ahead.offloaded(40 * GIB, None) == 30 * GIB


@pytest.mark.parametrize(
    ("kind", "options", "what"),
    [
        (VLLMSystem, {"backend": "disk"}, "options.backend"),
        (VLLMSystem, {"cpu_offload_gb": -1}, "options.cpu_offload_gb"),
        (VLLMSystem, {"group_size": 2, "num_in_group": 3}, "options.num_in_group.*group_size = 2"),
        (VLLMSystem, {"offload": "cpu"}, "options.offload"),
        (KTransformersSystem, {"gpu_experts": -1}, "options.gpu_experts"),
        (KTransformersSystem, {"prefill_threshold": 0}, "options.prefill_threshold"),
    ],
)
def test_options_are_checked(kind: type[System], options: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=what):
        system(kind, tmp_path, system_options=options).check()


@pytest.mark.parametrize("kind", [VLLMSystem, KTransformersSystem])
def test_a_machine_without_cuda_is_refused(kind: type[System], tmp_path: Path) -> None:
    spec = system(kind, tmp_path, hardware=HardwareProfile("local", Accelerator.NONE)).spec
    with pytest.raises(CannotRun, match=r"not installed: vllm.*pip install vllm|runs on cuda, not on none"):
        check_capable(kind, spec)


def test_what_is_missing_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = ModelShape("moe", "qwen3_moe", 2, 64, 4, 2, 16, 96, 300, 128, False)
    model = replace(shared.spec_of("transformers", "llama").model, shape=mixture)
    monkeypatch.setattr("baselines.ktransformers.system.find_spec", lambda name: None)
    with pytest.raises(CannotRun, match=r"not installed: kt_kernel, sglang\. pip install kt-kernel"):
        system(KTransformersSystem, tmp_path, model=model, dtype=DType.BFLOAT16).check()
    with pytest.raises(CannotRun, match="bfloat16, not in float32"):
        system(KTransformersSystem, tmp_path, model=model).check()
    with pytest.raises(CannotRun, match=r"llama is none of the families.*qwen3_moe"):
        system(KTransformersSystem, tmp_path, dtype=DType.BFLOAT16).check()


def test_the_server_of_ktransformers_is_started_as_its_tutorial_says() -> None:
    settings = KTSettings.of({"gpu_experts": 20, "thread_pools": 2, "prefill_threshold": 2048})
    command = " ".join(settings.command(Path("/model"), 30000, 16, 8, 544))
    for part in (
        "sglang.launch_server",
        "--model /model --kt-weight-path /model --kt-method BF16",
        "--kt-cpuinfer 16 --kt-threadpool-count 2 --kt-num-gpu-experts 20",
        "--max-running-requests 8 --max-total-tokens 4352",
        "--kt-gpu-prefill-token-threshold 2048",
    ):
        assert part in command
