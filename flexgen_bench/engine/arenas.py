"""Every arena of an engine, allocated by name from the plan and accounted for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flexgen_bench.core.tiers import Site, Tier
from flexgen_bench.core.units import PAGE, aligned, format_bytes
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.memory_pool import KeptMemory
from flexgen_bench.engine.step_errors import explain_memory
from flexgen_bench.schedule.scheduled_job import ScheduledJob


class Arenas:
    """Allocates memory on a tier under the name the plan has for it. ``bytes``: what was asked for so far, per tier and
    name.

    kept: host memory to begin with, and where it goes when it is handed on.
    """

    def __init__(self, device: Device, kept: KeptMemory | None = None) -> None:
        self._device = device
        self._kept = kept
        self._on_host: list[Tensor] = []
        self.bytes: dict[Tier, dict[str, int]] = {}

    def allocate(self, tier: Tier, name: str, num_bytes: int) -> Tensor:
        """uint8 memory of exact size, zeroed. OutOfMemory if the system refuses what the plan said would fit."""
        self.note(tier, name, num_bytes)
        # An emulated accelerator's memory is the host's.
        kept = self._kept if tier is Tier.CPU or not self._device.is_cuda else None
        if kept is not None:
            memory = self._on_host_again(kept, num_bytes)
            if memory is not None:
                return memory
        try:
            memory = self._device.allocate(tier, num_bytes)
        except (MemoryError, RuntimeError) as error:  # torch's own are RuntimeErrors
            explain_memory(error, f"allocating {format_bytes(num_bytes)} of {name}")
            raise
        if memory.is_cuda:
            memory.zero_()  # padding is multiplied by zero: it must not hold NaN
        if kept is not None:
            self._on_host.append(memory)
        return memory

    def end(self, kind: type[BaseException] | None = None, *_: object) -> None:
        """Nothing uses this memory any more: what of it is on the host is kept for the next job. Nothing is kept after
        an error (of this ``kind``), which may have been for want of memory."""
        if self._kept is not None:
            self._kept.keep(self._on_host)
            if kind is not None:
                self._kept.release()
        self._on_host.clear()

    def _on_host_again(self, kept: KeptMemory, num_bytes: int) -> Tensor | None:
        memory = kept.take(max(PAGE, aligned(num_bytes)))
        if memory is not None:
            self._on_host.append(memory.zero_())
        return memory

    def note(self, tier: Tier, name: str, num_bytes: int) -> None:
        """Account for bytes that are not memory: files."""
        names = self.bytes.setdefault(tier, {})
        names[name] = names.get(name, 0) + num_bytes


def together(job: ScheduledJob, *parts: Mapping[Tier, Mapping[str, int]]) -> dict[Site, dict[str, int]]:
    """Bytes by name of several arenas, which have no names in common, for each site of a job."""
    allocated: dict[Site, dict[str, int]] = {}
    for part in parts:
        for tier, names in part.items():
            allocated.setdefault(job.site_of(tier), {}).update(names)
    return allocated
