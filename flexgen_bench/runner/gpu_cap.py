"""A cap on the GPU memory of one cell's process: the GPU's counterpart of ``memory_cap``.

torch's allocator is told to hold no more than the share; what else is on the GPU (the driver's context, some hundreds
of MiB) is not counted, for any system. A system that computes in a process of its own sets the same there.
"""

from __future__ import annotations

from typing import Any

from flexgen_bench.core.hardware import Accelerator, HardwareProfile


def apply_gpu_cap(hardware: HardwareProfile) -> dict[str, Any] | None:
    """Hold this process to the profile's GPU memory. What was done, for the record; None without a CUDA device.

    ``requested_bytes``, ``enforced``, ``total_bytes`` of the GPU, ``reason`` where it is not enforced.
    """
    import torch

    if hardware.accelerator is not Accelerator.CUDA or not torch.cuda.is_available():
        return None
    cap_bytes = hardware.gpu_memory_bytes
    total = int(torch.cuda.get_device_properties(0).total_memory)
    cap = {"requested_bytes": cap_bytes, "enforced": False, "total_bytes": total, "reason": ""}
    if cap_bytes is None:
        return cap | {"reason": "no cap was asked for"}
    if cap_bytes >= total:
        return cap | {"reason": "the GPU has no more than that"}
    torch.cuda.set_per_process_memory_fraction(cap_bytes / total, 0)
    return cap | {"enforced": True}
