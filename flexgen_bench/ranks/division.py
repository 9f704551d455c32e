"""How a machine is divided among its ranks: devices, threads, memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from flexgen_bench.core.compression import Compression
from flexgen_bench.core.errors import CannotRun, UserError
from flexgen_bench.core.folders import make_writable
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.pipeline import Stage, divided
from flexgen_bench.core.slices import Slice
from flexgen_bench.core.tiers import LaneKind
from flexgen_bench.engine.device import Device
from flexgen_bench.machine.measured_rates import calibrated_rates, with_calibration
from flexgen_bench.memory import host
from flexgen_bench.models.model import Model
from flexgen_bench.planner.rank_machines import in_one_machine
from flexgen_bench.ranks.torchrun import Torchrun

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Division:
    """ranks: in all; here: on this machine, which computes with machine_threads. hardware, threads: one rank's own
    part. layers: of each rank, where that is stated. shared: every rank has a slice of all layers, instead of layers of
    its own."""

    ranks: int
    here: int
    hardware: HardwareProfile
    threads: int
    machine_threads: int
    torchrun: Torchrun | None = None
    layers: tuple[int, ...] | None = None
    shared: bool = False

    @property
    def part(self) -> Slice | None:
        """The slice of this process; None where no rank shares a layer."""
        return Slice(self.rank, self.ranks) if self.shared else None

    @property
    def rank(self) -> int:
        """Of this process."""
        return 0 if self.torchrun is None else self.torchrun.rank

    def stages(self, num_layers: int) -> tuple[Stage | None, ...]:
        """Which rank computes which layers, None where each has a slice of all. UserError for ranges that do not cover
        the model, and for more ranks than layers."""
        if self.shared:
            return (None,) * self.ranks
        return divided(num_layers, self.ranks, self.layers)

    def check(self, shape: ModelShape, dtype: DType, compression: Compression | None) -> None:
        """UserError if the ranks cannot divide a model like this: its layers, or what they share of each."""
        self.stages(shape.num_layers)
        if self.part is not None:
            Model.of(shape, dtype, compression).sliced(self.part)

    @property
    def setting(self) -> str:
        """What has asked for several ranks."""
        return "gpu.tensor_parallel" if self.shared else "gpu.count"

    def open_device(self, cache: Path | None = None) -> Device:
        """Of this process; with the rates that its machine was calibrated to in ``cache``, where none are stated.
        CannotRun if the profile wants CUDA and there is none."""
        if self.torchrun is not None and self.hardware.accelerator is Accelerator.CUDA:
            _take_own_device(self.torchrun)
        device = Device.open(self.hardware, self.threads)
        if cache is None or self.hardware.rates is not None:
            return device
        rates = calibrated_rates(cache, self.machine_threads)  # as the whole machine is calibrated
        if rates is None:
            return device
        return replace(device, hardware=_rates_of_part(with_calibration(self.hardware, rates), self.here))

    def with_disk(self, hardware: HardwareProfile, offload_dir: Path) -> HardwareProfile:
        """One rank's ``hardware`` with no more disk than its part of what is free there: each rank sees all of that
        as free. UserError for a folder that cannot be written."""
        free = psutil.disk_usage(str(make_writable(offload_dir, "offload_dir"))).free // self.here
        stated = hardware.disk_bytes
        return replace(hardware, disk_bytes=max(1, free if stated is None else min(stated, free)))


def divide(
    hardware: HardwareProfile, threads: int, ranks: int | None = None, torchrun: Torchrun | None = None
) -> Division:
    """The part of ``hardware`` that each rank has. ranks: None for what the profile says (``gpu.count``), and what
    torchrun has started. One is this process alone, whoever else torchrun has started.

    One rank has all of it, untouched. Raises UserError for numbers that contradict each other, CannotRun where there
    are fewer CUDA devices than ranks.
    """
    if ranks is not None and (not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1):
        raise UserError("ranks", ranks, "an integer of at least 1, or None for what gpu.count says")
    if ranks == 1:
        torchrun = None
    shared = hardware.tensor_parallel > 1
    name, profile = ("gpu.tensor_parallel", hardware.tensor_parallel) if shared else ("gpu.count", hardware.count)
    if shared and ranks not in (None, profile):
        raise UserError("ranks", ranks, f"{profile}, as gpu.tensor_parallel says, or left out")
    stated = ranks if ranks is not None else profile if profile > 1 else None
    if torchrun is not None and stated not in (None, torchrun.ranks):
        raise UserError(
            "ranks" if ranks is not None else name,
            stated,
            f"{torchrun.ranks}, as many as torchrun has started, or left out",
        )
    count = torchrun.ranks if torchrun is not None else stated or 1
    layers = hardware.layers_per_rank
    if layers is not None and len(layers) != count:
        raise UserError("gpu.layers_per_rank", list(layers), f"{count} numbers, one for each rank")
    here = count if torchrun is None else torchrun.here
    if count == 1:
        return Division(1, 1, replace(hardware, count=1, layers_per_rank=None), threads, threads)
    has_own = torchrun is not None and _has_own_device()
    if hardware.accelerator is Accelerator.CUDA and not has_own and torch.cuda.device_count() < here:
        raise CannotRun(
            f"{name} = {here} on this machine: it has {torch.cuda.device_count()} CUDA devices, and each rank needs "
            "one of its own. Use fewer ranks, or more machines with torchrun."
        )
    own = _own_part(hardware, here), max(1, threads // here)
    return Division(count, here, *own, threads, torchrun, layers, shared)


def _own_part(hardware: HardwareProfile, here: int) -> HardwareProfile:
    """Of the host's memory and disk, an equal part for each of ``here`` ranks; each device is a rank's own."""
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    memory = min(size for size in (hardware.cpu_memory_bytes, host.group_limit(), free) if size is not None)
    return replace(
        hardware,
        count=1,
        tensor_parallel=1,
        layers_per_rank=None,
        cpu_memory_bytes=max(1, memory // here),
        disk_bytes=None if hardware.disk_bytes is None else max(1, hardware.disk_bytes // here),
        links=_disk_divided(hardware.links, here),
    )


def _disk_divided(links: Mapping[str, float], here: int) -> dict[str, float]:
    """Rates of links, of which ranks of a machine share its disk's."""
    shared = (LaneKind.DISK_READ, LaneKind.DISK_WRITE)
    return {kind: rate / here if kind in shared else rate for kind, rate in links.items()}


def _rates_of_part(hardware: HardwareProfile, here: int) -> HardwareProfile:
    """A rank's part, whose measured rates are its machine's so far, with those of its part of cores, memory and disk,
    as the planner divides them."""
    rates = in_one_machine(hardware, here)[0].hardware.rates
    if here == 1 or rates is None:
        return hardware
    return replace(hardware, rates=replace(rates, links=_disk_divided(rates.links, here)))


def environment_of(local_rank: int) -> dict[str, str]:
    """What a process of this machine is told so that it sees one CUDA device, its own."""
    visible = _visible()
    return {VISIBLE: visible[local_rank] if local_rank < len(visible) else str(local_rank)}


def _visible() -> list[str]:
    """The CUDA devices that this process has been given; none where nobody has said which."""
    return [one for one in os.environ.get(VISIBLE, "").split(",") if one.strip()]


def _has_own_device() -> bool:
    """Whether who started this process has given it one device."""
    return len(_visible()) == 1


def _take_own_device(torchrun: Torchrun) -> None:
    """Leave this process one CUDA device, its own, before torch looks for any; one that it has been given stays.
    CannotRun where torch has looked already and would take another one's."""
    if _has_own_device():
        return
    if torch.cuda.is_initialized():
        raise CannotRun(
            "CUDA is in use in this process already, so it cannot be given a device of its own. Make the LLM before "
            f"anything else touches CUDA, or set {VISIBLE} to one device for each process."
        )
    os.environ.update(environment_of(torchrun.local_rank))
