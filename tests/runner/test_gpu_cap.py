"""The cap on GPU memory, with a stand-in for the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.units import GB, GIB
from flexgen_bench.runner.gpu_cap import apply_gpu_cap


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A GPU of 80 GiB; returns the shares that torch was told."""
    told: list[float] = []
    cuda: Any = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(cuda, "set_per_process_memory_fraction", lambda share, index: told.append(share))
    return told


def test_a_larger_gpu_is_held_to_the_profile(fractions: list[float]) -> None:
    cap = apply_gpu_cap(HardwareProfile("gpu16", Accelerator.CUDA, gpu_memory_bytes=16 * GB))
    assert cap == {"requested_bytes": 16 * GB, "enforced": True, "total_bytes": 80 * GIB, "reason": ""}
    assert fractions == [16 * GB / (80 * GIB)]


@pytest.mark.parametrize(("wanted", "reason"), [(None, "no cap was asked for"), (80 * GIB, "no more than that")])
def test_nothing_to_enforce(fractions: list[float], wanted: int | None, reason: str) -> None:
    cap = apply_gpu_cap(HardwareProfile("h100", Accelerator.CUDA, gpu_memory_bytes=wanted))
    assert cap is not None
    assert not cap["enforced"]
    assert reason in cap["reason"]
    assert fractions == []


def test_other_devices_have_none(fractions: list[float]) -> None:
    emulated = HardwareProfile("emulated", Accelerator.EMULATED, gpu_memory_bytes=GIB)
    assert apply_gpu_cap(emulated) is None
    assert apply_gpu_cap(HardwareProfile("cpu", Accelerator.NONE)) is None
    assert fractions == []
