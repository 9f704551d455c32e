"""Host memory registered with CUDA, with a stand-in for CUDA's runtime; and how much of a GPU a plan may use."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from flexgen_bench.core.device_memory import WORKSPACE_BYTES, gpu_room
from flexgen_bench.core.units import GIB, MIB, PAGE
from flexgen_bench.memory import host
from flexgen_bench.memory.host import allocate


def is_mapped(address: int) -> bool:
    spans = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(stop, 16) for start, stop in spans)


@dataclass
class FakeRuntime:
    """Answers like ``torch.cuda.cudart()``; notes what was registered, and whether it was mapped when it ended."""

    status: int = 0
    registered: dict[int, int] = field(default_factory=dict)
    mapped_when_unregistered: list[bool] = field(default_factory=list)

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if self.status == 0:
            self.registered[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        self.mapped_when_unregistered.append(is_mapped(address))
        del self.registered[address]
        return 0

    def cudaGetErrorString(self, status: int) -> str:
        return "out of memory"


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    return fake


def test_registered_memory_is_unregistered_before_it_is_unmapped(runtime: FakeRuntime) -> None:
    """It used to be told by a weak reference, which Python calls after ``munmap``: another thread could have been
    given the same addresses by then."""
    size = 4 * MIB + PAGE  # its own mapping, and large enough for huge pages
    tensor = allocate(size, pinned=True)
    assert runtime.registered == {tensor.data_ptr(): size}
    view = tensor[PAGE:].view(torch.float32)
    del tensor
    assert runtime.registered, "a view keeps the memory"
    view.fill_(1.0)
    del view
    assert not runtime.registered
    assert runtime.mapped_when_unregistered == [True]


def test_plain_memory_asks_nothing_of_cuda(runtime: FakeRuntime) -> None:
    tensor = allocate(1)
    assert tensor.numel() == PAGE
    assert tensor.data_ptr() % PAGE == 0
    del tensor
    assert runtime.mapped_when_unregistered == []


def test_memory_that_cannot_be_locked_is_refused_and_released(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[bool] = []
    monkeypatch.setattr(host, "_forget_error", lambda: forgotten.append(True))
    runtime.status = 2
    with pytest.raises(MemoryError, match=r"page-lock 4096 bytes.*out of memory"):
        allocate(PAGE, pinned=True)
    assert runtime.mapped_when_unregistered == []
    assert forgotten, "the next kernel launch would report the error of this one"


@pytest.mark.parametrize(
    ("free", "cap", "reserved", "room"),
    [
        (80 * GIB, None, 0, 80 * GIB - WORKSPACE_BYTES),
        (80 * GIB, 16 * GIB, 0, 16 * GIB - WORKSPACE_BYTES),
        (80 * GIB, 16 * GIB, 15 * GIB, GIB - 128 * MIB),  # weights of this process are in place
        (4 * GIB, 16 * GIB, 0, 4 * GIB - WORKSPACE_BYTES),  # somebody else uses the GPU
        (GIB, 16 * GIB, 16 * GIB, 0),
    ],
)
def test_room_on_a_gpu(free: int, cap: int | None, reserved: int, room: int) -> None:
    assert gpu_room(free, cap, reserved) == room
