"""What a machine is called in tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexgen_bench.core.codec import as_mapping
from flexgen_bench.core.units import format_bytes


def machine_of(environment: Mapping[str, Any]) -> str:
    """The kind of machine a record was measured on, as far as its environment tells; never a host name."""
    cpu, memory = as_mapping(environment.get("cpu")), as_mapping(environment.get("memory"))
    gpus = environment.get("gpus")
    parts = [str(as_mapping(gpu).get("name")) for gpu in (gpus if isinstance(gpus, list) else [])]
    if cpu.get("model"):
        parts.append(str(cpu["model"]))
    if cpu.get("usable_cores"):
        parts.append(f"{cpu['usable_cores']} usable cores")
    if cpu.get("limited_to"):
        parts.append(f"instructions limited to {cpu['limited_to']}")
    total = memory.get("total_bytes")
    if isinstance(total, int) and not isinstance(total, bool):
        parts.append(f"{format_bytes(total)} of memory")
    return ", ".join(parts)
