"""Every arena of an engine, allocated by name from the plan and accounted for."""

from __future__ import annotations

from torch import Tensor

from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import format_bytes
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.step_errors import explain_memory


class Arenas:
    """Allocates memory on a tier under the name the plan has for it. ``bytes``: what was asked for so far, per tier and name."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.bytes: dict[Tier, dict[str, int]] = {}

    def allocate(self, tier: Tier, name: str, num_bytes: int) -> Tensor:
        """uint8 memory of exact size, zeroed. OutOfMemory if the system refuses what the plan said would fit."""
        self.note(tier, name, num_bytes)
        try:
            memory = self._device.allocate(tier, num_bytes)
        except (MemoryError, RuntimeError) as error:  # torch's own are RuntimeErrors
            explain_memory(error, f"allocating {format_bytes(num_bytes)} of {name}")
            raise
        if memory.is_cuda:
            memory.zero_()  # padding is multiplied by zero: it must not hold NaN
        return memory

    def note(self, tier: Tier, name: str, num_bytes: int) -> None:
        """Account for bytes that are not memory: files."""
        names = self.bytes.setdefault(tier, {})
        names[name] = names.get(name, 0) + num_bytes
