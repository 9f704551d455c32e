"""What of an accelerator's memory no tensor can have. Everybody who runs on a device pays it, measured or simulated,
this engine and its rivals alike.

``gpu_memory`` of a profile is what the driver says the card has (``nvidia-smi``, memory.total). Of that a job gets
less: the driver keeps some, and a process' CUDA context and the libraries loaded into it take some. Beside the tensors
that a plan or a model counts, torch's allocator takes some more: workspaces of cuBLAS, and what cutting memory into
blocks loses.
"""

from __future__ import annotations

from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.units import MIB

# MEASURED on an H100 (driver 580, torch 2.11, CUDA 13; results/benchmarks/gpu_check/environment.json): memory.total is
# 81,559 MiB, a process is told of 85,017,493,504 bytes, and once it has a context 84,465,090,560 of them are free. A T4
# differs by little: of its 15,360 MiB processes were told of 14.56 GiB (Zheng-Chong/CatVTON issue 133), 451 MiB less.
DRIVER_BYTES = 81_559 * MIB - 85_017_493_504  # 479 MiB
CONTEXT_BYTES = 85_017_493_504 - 84_465_090_560  # 527 MiB
# What torch takes besides the tensors of a plan: cuBLAS workspaces (32 MiB for each stream on recent GPUs), segments
# that are cut in pieces, and tensors another stream has not let go of yet. Assumed, not measured.
WORKSPACE_BYTES = 384 * MIB


def gpu_room(free: int, cap: int | None, reserved: int) -> int:
    """Bytes a plan may use on a GPU: what is free, and under a cap what this process (``reserved`` bytes held) has left
    of it; less what torch takes for itself."""
    room = free if cap is None else min(free, cap - reserved)
    return max(0, room - min(WORKSPACE_BYTES, room // 8))


def process_bytes(hardware: HardwareProfile) -> int:
    """Of a profile's GPU memory, what the driver and a process' context take; none where there is no such device, and
    none of a cap on torch's allocator (``runner/gpu_cap.py``), outside of which both are."""
    has_context = hardware.accelerator is Accelerator.CUDA and not hardware.gpu_memory_is_cap
    return DRIVER_BYTES + CONTEXT_BYTES if has_context else 0


def job_bytes(hardware: HardwareProfile) -> int | None:
    """Bytes that a plan may use on the GPU of a machine with nothing else in it; None: the machine has none, or nobody
    knows its memory."""
    size = hardware.gpu_memory_bytes
    if hardware.accelerator is not Accelerator.CUDA or size is None:
        return None
    return gpu_room(size - process_bytes(hardware), None, 0)


def reserved_bytes(hardware: HardwareProfile) -> int:
    """What is kept from a plan: of the GPU's memory, or of any large one where it is not known."""
    room = job_bytes(hardware)
    if room is None or hardware.gpu_memory_bytes is None:
        taken = process_bytes(hardware)
        return taken + WORKSPACE_BYTES if taken else 0
    return hardware.gpu_memory_bytes - room
