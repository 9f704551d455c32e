"""A machine as the models of baselines see it: the rates of its profile, with what it does not state filled in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from flexgen_bench.core.device_memory import process_bytes
from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.rates import Rates, SiteRates
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.planner.cost import rates_of

# Of host memory, what a process of a baseline takes beside tensors: Python, torch, the loader, with a GPU also CUDA's
# libraries and what is page-locked. Without: MEASURED, torch's build for processors, 170 MiB of a system that refuses
# before it loads; 0.99 GiB of Accelerate's at its peak (results/default, OPT-1.3B), 0.5 GB of which are the buffers and
# activations that are counted by themselves.
GPU_PROCESS_BYTES, CPU_PROCESS_BYTES = 3e9, 0.5e9
# Pageable copies go through a bounce buffer of the driver: a quarter of the pinned rate is usual (as conf/gpu/t4.yaml
# assumes).
PAGEABLE_SHARE = 0.25


@dataclass(frozen=True)
class Machine:
    """One machine of a profile. All rates in bytes/s."""

    hardware: HardwareProfile

    @cached_property
    def rates(self) -> Rates:
        """UserError for a profile that does not say what its machine sustains."""
        return rates_of(self.hardware)

    @property
    def has_gpu(self) -> bool:
        """Whether baselines compute on an accelerator; an emulated one is this project's own."""
        return self.hardware.accelerator is Accelerator.CUDA

    @property
    def host_process_bytes(self) -> float:
        """Of host memory, beside tensors."""
        return GPU_PROCESS_BYTES if self.has_gpu else CPU_PROCESS_BYTES

    @cached_property
    def compute(self) -> SiteRates:
        """What computes."""
        return self.rates.sites[Tier.GPU if self.has_gpu else Tier.CPU]

    @cached_property
    def cpu(self) -> SiteRates:
        return self.rates.sites[Tier.CPU]

    def link(self, lane: Lane) -> float:
        """A link's rate, from page-locked memory and around the page cache."""
        rate = self.hardware.link_rate(lane)
        assert rate is not None, "rates_of has checked the links"
        return rate

    @cached_property
    def h2d(self) -> float:
        """To where it is computed: without an accelerator, a copy inside host memory."""
        return self.link(Lane.H2D) if self.has_gpu else self.cpu.memory / 2

    @cached_property
    def d2h(self) -> float:
        return self.link(Lane.D2H) if self.has_gpu else self.cpu.memory / 2

    @cached_property
    def h2d_pageable(self) -> float:
        stated = self.rates.transfers.get("h2d_pageable", PAGEABLE_SHARE * self.h2d)
        return stated if self.has_gpu else self.h2d

    @cached_property
    def d2h_pageable(self) -> float:
        return self.rates.transfers.get("d2h_pageable", PAGEABLE_SHARE * self.d2h)

    @cached_property
    def disk_read(self) -> float:
        return self.link(Lane.DISK_READ)

    @cached_property
    def disk_write(self) -> float:
        return self.link(Lane.DISK_WRITE)

    @cached_property
    def disk_read_cached(self) -> float:
        """Of a file that is in the page cache; never slower than the disk."""
        return max(self.rates.transfers.get("disk_read_cached", 0.0), self.disk_read)

    @cached_property
    def disk_write_cached(self) -> float:
        """Into the page cache, as long as it takes."""
        return max(self.rates.transfers.get("disk_write_cached", 0.0), self.disk_write)

    @property
    def process_bytes(self) -> float:
        """Of the GPU's memory, what no tensor can have (``core/device_memory.py``). What a system's own allocator loses
        is in its model."""
        return process_bytes(self.hardware) if self.has_gpu else 0.0

    @property
    def host_bytes(self) -> int | None:
        """Of host memory."""
        return self.hardware.cpu_memory_bytes

    def check(self, tier: Tier, parts: dict[str, float], action: str) -> None:
        """Raise DoesNotFit if parts (bytes by name) need more than the tier has."""
        capacity = {
            Tier.GPU: self.hardware.gpu_memory_bytes if self.has_gpu else None,
            Tier.CPU: self.host_bytes,
            Tier.DISK: self.hardware.disk_bytes,
        }[tier]
        need = sum(parts.values())
        if capacity is not None and need > capacity:
            named = sorted(((size, name) for name, size in parts.items() if size), reverse=True)
            text = ", ".join(f"{name} {size / 2**30:.2f} GiB" for size, name in named)
            raise DoesNotFit(tier, int(need), capacity, text, action)


def largest_that_fits(fits: Callable[[int], object], limit: int) -> int:
    """The largest count up to ``limit`` for which ``fits`` raises no DoesNotFit: what fits with more fits with fewer.
    Raises that of 1 if there is none."""
    fits(1)

    def does(count: int) -> bool:
        try:
            fits(count)
        except DoesNotFit:
            return False
        return True

    good, bad = 1, 2
    while bad <= limit and does(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, limit + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if does(middle) else (good, middle)
    return good
