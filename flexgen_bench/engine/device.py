"""The compute device: a CUDA GPU, an emulated one, or the host itself; and how bytes reach it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
import torch
from torch import Tensor

from flexgen_bench.core.compression import Along, Compression
from flexgen_bench.core.device_memory import gpu_room
from flexgen_bench.core.errors import CannotRun
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.tiers import NETWORK, Lane, LaneKind, Tier
from flexgen_bench.engine.executor import LaneSettings
from flexgen_bench.engine.network_lane import receiving_rate
from flexgen_bench.engine.throttle import Link
from flexgen_bench.kernels.fused_product import MOST_ROWS, is_fused
from flexgen_bench.machine.host import threads_beside_a_gpu
from flexgen_bench.memory import host


@dataclass(frozen=True)
class Device:
    """Where matrix products run. On a plain host and on the emulated accelerator that is the cpu."""

    hardware: HardwareProfile
    torch_device: torch.device
    threads: int

    @staticmethod
    def open(hardware: HardwareProfile, threads: int) -> Device:
        """The device of a profile; CannotRun if the profile wants CUDA and there is none."""
        if hardware.accelerator is Accelerator.CUDA:
            if not torch.cuda.is_available():
                raise CannotRun(
                    f"gpu={hardware.name} needs a CUDA device, and torch sees none here. "
                    "Use gpu=cpu or gpu=emulated, or install a CUDA build of torch (see README)."
                )
            return Device(hardware, torch.device("cuda"), threads)
        return Device(hardware, torch.device("cpu"), threads)

    @property
    def is_cuda(self) -> bool:
        return self.torch_device.type == "cuda"

    @property
    def launches_kernels(self) -> bool:
        """Whether every operator on the compute tier is a launch, so that few and large ones are worthwhile."""
        return self.is_cuda

    @property
    def records_graphs(self) -> bool:
        """Whether what is issued can be recorded and launched again as one (``graphs.py``)."""
        return self.is_cuda

    def packed_rows(self, weights: Compression, dtype: torch.dtype) -> int:
        """Rows up to which matrices in this compression are multiplied with as they lie; 0: never. Asked for the first
        time, kernels are compiled and tried."""
        kinds = {weights, weights.of_vocabulary}
        along = weights.along is Along.INPUTS
        return MOST_ROWS if along and all(is_fused(self.torch_device, kind, dtype) for kind in kinds) else 0

    @property
    def compute_tier(self) -> Tier:
        return self.hardware.compute_tier

    def allocate(self, tier: Tier, num_bytes: int) -> Tensor:
        """uint8 memory of exact size on a tier (gpu or cpu); host memory is registered with CUDA if there is one."""
        if tier is Tier.GPU and self.is_cuda:
            return torch.empty(max(num_bytes, 1), dtype=torch.uint8, device=self.torch_device)
        return host.allocate(num_bytes, pinned=self.is_cuda)

    def settle(self) -> None:
        """Wait until memory that was allocated and filled outside the lanes is ready for their streams."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy in host memory: asynchronous, on the lane's stream, for a CUDA tensor."""
        out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.is_cuda)
        return out.copy_(crossing(tensor), non_blocking=True)

    def to_compute(self, tensor: Tensor) -> Tensor:
        """A copy on the compute device: asynchronous, on the lane's stream, on CUDA."""
        if self.is_cuda and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.torch_device, non_blocking=True, copy=True)

    def lane_settings(self, network: bool = False) -> dict[Lane, LaneSettings]:
        """How each lane runs: streams on CUDA, throttled threads on the emulated accelerator. network: with those to
        other ranks."""
        lanes = (*(Lane(kind) for kind in NETWORK if network), *self.hardware.lanes)
        throttled = self._throttled(lanes)
        computing = threads_beside_a_gpu(self.threads) if self.is_cuda else self.threads
        # The order of rows in pictures: what computes comes last, the accelerator after the host.
        lanes = tuple(sorted(lanes, key=lambda lane: lane.kind is LaneKind.GPU))
        return {
            lane: LaneSettings(
                threads=computing if lane.computes else 1,
                link=throttled.get(lane.link),
                stream=_stream(lane) if self.is_cuda and lane.of_accelerator else None,
            )
            for lane in lanes
        }

    def _throttled(self, lanes: Iterable[Lane]) -> dict[Lane, Link]:
        """Only an emulated accelerator's links are slowed down; real links have the speed they have. Other ranks are
        taken to send as fast as this one."""
        if self.hardware.accelerator is not Accelerator.EMULATED:
            return {}
        stated = self.hardware.links
        links = {lane.link for lane in lanes if lane.is_link}
        rates: dict[Lane, float | None] = {link: stated[link.kind] for link in links if link.kind in stated}
        into = Lane(LaneKind.NET_IN)
        if into in rates:
            rates[into] = receiving_rate(stated[into.kind], stated.get(LaneKind.NET_OUT))
        return {link: Link(rate) for link, rate in rates.items() if rate is not None}

    def available(self, offload_dir: Path) -> dict[Tier, int]:
        """Bytes that a plan may use now, per tier: what is free, and under a cap also what the process has left of
        it."""
        free = {Tier.CPU: psutil.virtual_memory().available, Tier.DISK: psutil.disk_usage(str(offload_dir)).free}
        caps = (self.hardware.cpu_memory_bytes, host.group_limit())
        cap = min((c for c in caps if c is not None), default=None)
        if cap is not None:  # Python, torch and their libraries live under the cap too
            free[Tier.CPU] = min(free[Tier.CPU], max(0, cap - psutil.Process().memory_info().rss))
        if self.is_cuda:
            torch.cuda.empty_cache()  # what torch keeps for later would count as used
            free[Tier.GPU] = gpu_room(
                torch.cuda.mem_get_info()[0], self.hardware.gpu_memory_bytes, torch.cuda.memory_reserved()
            )
        return free


@cache
def _stream(lane: Lane) -> torch.cuda.Stream:
    """The lane's stream, one for the whole process: torch keeps freed memory and cuBLAS workspaces per stream, and
    those of a stream that is not used again would be lost to the next job."""
    return torch.cuda.Stream()


def crossing(tensor: Tensor) -> Tensor:
    """Mark a tensor as used by this lane's stream although another one allocated it.

    torch reuses freed GPU memory in the order of the stream that allocated it; without the mark a later
    tensor of that stream could be written while this one is still being read.
    """
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream())
    return tensor
