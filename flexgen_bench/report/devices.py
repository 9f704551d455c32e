"""The devices of a machine in words: what is not of the same devices may not stand in one table or picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_bench.core.hardware import HardwareProfile


def devices_of(machine: HardwareProfile) -> str:
    """As ``devices``, of a profile."""
    names = ("name", "count", "tensor_parallel", "layers_per_rank")
    return devices({name: getattr(machine, name) for name in names})


def devices(hardware: Mapping[str, Any]) -> str:
    """The name of one device's machine; ``4 x t4`` where four have layers of their own, ``2 x t4 (10 + 22
    layers)`` where it was said how many, ``t4, every layer shared by 4``.

    hardware: a profile's fields as a record has them; those that it leaves out are of one device.
    """
    name = str(hardware.get("name", ""))
    shared, count, layers = (hardware.get(key) for key in ("tensor_parallel", "count", "layers_per_rank"))
    if isinstance(shared, int) and shared > 1:
        return f"{name}, every layer shared by {shared}"
    if not isinstance(count, int) or count < 2:
        return name
    return f"{count} x {name}" + (f" ({' + '.join(map(str, layers))} layers)" if layers else "")
