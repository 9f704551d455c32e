"""Rates of the links between host and accelerator; on a machine without CUDA, of copies within host memory.

Such copies are what an emulated accelerator's links consist of before they are throttled: on one thread, as a link's
lane has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import TYPE_CHECKING

from flexgen_bench.calibrate.effort import Effort
from flexgen_bench.calibrate.site import ProbeMemory, Site
from flexgen_bench.calibrate.stable import Probe
from flexgen_bench.memory import host

if TYPE_CHECKING:
    from torch import Tensor

# Rates of other sizes than the largest: for people, no model uses them.
ALSO = "also"


def cuda_probes(gpu: Site, effort: Effort) -> Iterator[Probe]:
    """``links.h2d`` and ``.d2h`` (memory registered as the engine does it), ``transfers.h2d_pageable`` and
    ``.d2h_pageable``, with the largest size; smaller ones as ``also.<name>.<bytes>``."""
    import torch

    for size in effort.link_bytes:
        there = torch.empty(size, dtype=torch.uint8, device=gpu.device.torch_device)
        for pinned in (True, False):
            here = host.allocate(size, pinned=pinned)[:size]
            here.fill_(1)  # pages that are there
            for lane, target, source in (("h2d", there, here), ("d2h", here, there)):
                name = f"links.{lane}" if pinned else f"transfers.{lane}_pageable"
                if size != max(effort.link_bytes):
                    name = f"{ALSO}.{name}.{size}"
                yield Probe(name, size, _copy(target, source), gpu.settle)


def _copy(target: Tensor, source: Tensor) -> Callable[[], object]:
    return lambda: target.copy_(source, non_blocking=True)


def host_probes(memory_of_site: ProbeMemory, effort: Effort) -> Iterator[Probe]:
    """``links.h2d`` and ``.d2h``, both the same: from one place of host memory to another."""
    size = min(max(effort.link_bytes), memory_of_site.size // 4)
    places = memory_of_site.copies(size)
    pairs = cycle(list(zip(places[::2], places[1::2], strict=False)))
    for lane in ("h2d", "d2h"):
        yield Probe(f"links.{lane}", size, _copy_next(pairs.__next__, memory_of_site.site.device.threads))


def _copy_next(pair: Callable[[], tuple[Tensor, Tensor]], threads: int) -> Callable[[], object]:
    import torch

    def call() -> None:
        target, source = pair()
        torch.set_num_threads(1)
        target.copy_(source)
        torch.set_num_threads(threads)

    return call
