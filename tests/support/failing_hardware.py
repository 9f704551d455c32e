"""Disks, memory and weights that fail on demand, and a look at what a failure has left behind. Used by the tests of
failures."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch

from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Offloaded, Placement, Policy, Schedule
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.core.tiers import Tier
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.engine import Engine
from flexgen_bench.engine.generation import Running, to_full_length
from tests.support.tiny_models import greedy_reference, random_model, random_prompts, save

HOST = HardwareProfile("cpu", Accelerator.NONE)
EMULATED = HardwareProfile("emulated", Accelerator.EMULATED, gpu_memory_bytes=2**30, links={"h2d": 4e9, "d2h": 4e9})
NEW_TOKENS = 6
LENGTHS = [5, 18, 2, 9, 9]

DISK = [Placement.all_on(Tier.DISK)] * 3
MIXED = [Placement(cpu=0.4, disk=0.6)] * 3
# Name -> hardware and policy; in each of them weights, cache and activations are on disk, in whole or in part.
RIGS = {
    "host": (HOST, Policy(2, 2, *DISK)),
    "host-continuous-chunked": (HOST, Policy(2, 1, *DISK, schedule=Schedule.CONTINUOUS, prefill_chunk=4)),
    "host-no-overlap": (HOST, Policy(1, 3, *DISK, overlap=False)),
    "emulated": (EMULATED, Policy(2, 2, *DISK)),
    "emulated-continuous": (EMULATED, Policy(2, 2, *DISK, schedule=Schedule.CONTINUOUS)),
    "emulated-chunked-in-place": (EMULATED, Policy(2, 2, *MIXED, prefill_chunk=3, offloaded=Offloaded.IN_PLACE)),
}


@dataclass(frozen=True)
class Tiny:
    """A tiny model, packed, and its greedy tokens according to transformers."""

    weights: PackedWeights
    prompts: list[list[int]]
    tokens: list[list[int]]

    @staticmethod
    def make(folder: Path) -> Tiny:
        model, prompts = random_model("llama-tied-grouped"), random_prompts(LENGTHS)
        weights = PackedWeights.from_checkpoint(save(model, folder / "ckpt"), DType.FLOAT32, folder / "cache")
        return Tiny(weights, prompts, greedy_reference(model, prompts, NEW_TOKENS))

    def own_store(self, folder: Path) -> Tiny:
        """The same with a packed file of its own, to be damaged."""
        path = folder / "store" / "weights.bin"
        path.parent.mkdir()
        copyfile(self.weights.store.path, path)
        store = replace(self.weights.store, path=path)
        return replace(self, weights=replace(self.weights, store=store))

    @property
    def file(self) -> Path:
        return self.weights.store.path

    def sequences(self, **changes: Any) -> list[Running]:
        params = SamplingParams(max_tokens=NEW_TOKENS)
        return [replace(s, **changes) for s in to_full_length(self.prompts, params)]

    def engine(self, rig: str, offload: Path) -> Engine:
        hardware, policy = RIGS[rig]
        return self.weights.engine(policy, Device.open(hardware, 1), offload)

    def check(self, engine: Engine) -> None:
        """The engine works, and says what transformers says."""
        sequences = self.sequences()
        engine.generate(sequences)
        assert [s.new for s in sequences] == self.tokens


class Leftovers:
    """Threads, open files and files in the offload directory; what was there before is none of ours."""

    def __init__(self, offload: Path) -> None:
        self._offload = offload
        self._before = self._now()

    def check(self) -> None:
        """Nothing has been left behind."""
        assert self._now() == self._before

    def _now(self) -> tuple[list[str], list[str], list[Path]]:
        threads = [t.name for t in threading.enumerate() if t.name.startswith(("lane-", "disk"))]
        return sorted(threads), sorted(open_files()), list(self._offload.rglob("*"))


def open_files() -> list[str]:
    """What this process's descriptors of ordinary files are open on."""
    targets = []
    for number in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # the one that listed them
            continue
    return [name for name in targets if name.startswith("/") and not name.startswith(("/dev", "/proc"))]


class FailingDisk:
    """From some request on, ``os.preadv`` or ``os.pwritev`` fails for files whose name holds a word. Healthy until
    ``fail``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str, word: str) -> None:
        self._real: Callable[..., int] = getattr(os, call)
        self._word, self._left, self._errno = word, -1, 0
        self.count = 0
        monkeypatch.setattr(os, call, self._call)

    def fail(self, after: int, number: int) -> None:
        """Let ``after`` more requests pass, then fail with errno ``number``."""
        self._left, self._errno = after, number

    def heal(self) -> None:
        self._left = -1

    def _call(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self._word in os.readlink(f"/proc/self/fd/{fd}"):
            self.count += 1
            if self._left == 0:
                raise OSError(self._errno, os.strerror(self._errno))
            self._left -= 1
        return self._real(fd, buffers, offset)


def told(error: BaseException) -> str:
    """All of what an error tells."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def overflowing(folder: Path, name: str, factor: float) -> tuple[Path, Path]:
    """A model in which one matrix makes float16 overflow, though all of its weights are finite."""
    model = random_model("llama-multi-query")
    with torch.no_grad():
        matrix = dict(model.named_parameters())[name]
        matrix.mul_(factor)
        assert bool(torch.isfinite(matrix.half()).all())
    return save(model, folder / "ckpt"), folder / "cache"
