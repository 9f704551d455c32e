"""A conf/gpu group as a profile: the machine in front of us where it says ``auto``, sizes in bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flexgen_bench.config.schema import GpuConf
from flexgen_bench.core.codec import from_json
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.parsing import parse_bytes, parse_weight_share
from flexgen_bench.core.rates import Rates
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import MIB, format_bytes
from flexgen_bench.machine import host as machine


@dataclass(frozen=True)
class _Size:
    """Of a tier. count: bytes, None for whatever is there. share: of the weights, where it was asked for as one."""

    count: int | None = None
    share: float | None = None


def machine_profile(conf: GpuConf, weight_bytes: Callable[[], int] | None = None) -> HardwareProfile:
    """The machine that a conf/gpu group describes.

    weight_bytes: of the cell's model, uncompressed, in the cell's dtype, for sizes that are shares of them; None where
    no cell is in sight. Raises UserError for sizes that cannot be, and for shares of weights that nobody knows.
    """
    name, match, accelerator = conf.name, conf.device_match, conf.accelerator
    gpus = machine.local_gpus() if accelerator == "auto" and machine.torch_has_cuda() else ()
    if accelerator == "auto":
        # Resolved here, so that gpu=auto and gpu=cpu are one and the same cell on a machine without a GPU.
        name, match = (gpus[0].name, gpus[0].name) if gpus else ("cpu", "")
        accelerator = "cuda" if gpus else "none"
    known = [kind.value for kind in Accelerator]
    if accelerator not in known:
        raise unknown_choice("gpu.accelerator", accelerator, ["auto", *known])
    sizes = {
        Tier.GPU: _size(conf.gpu_memory, "gpu.gpu_memory", weight_bytes),
        Tier.CPU: _size(conf.cpu_memory, "gpu.cpu_memory", weight_bytes),
        Tier.DISK: _size(conf.disk, "gpu.disk", weight_bytes),
    }
    gpu_memory = sizes[Tier.GPU].count
    if gpu_memory is None and gpus:
        gpu_memory = gpus[0].memory_bytes
    return HardwareProfile(
        name=name,
        accelerator=Accelerator(accelerator),
        gpu_memory_bytes=gpu_memory,
        cpu_memory_bytes=sizes[Tier.CPU].count,
        disk_bytes=sizes[Tier.DISK].count,
        device_match=match,
        # Nobody sells cards by the size of a model: a share of it is a part of the card.
        gpu_memory_is_cap=conf.gpu_memory_is_cap or sizes[Tier.GPU].share is not None,
        count=conf.count,
        tensor_parallel=conf.tensor_parallel,
        layers_per_rank=None if conf.layers_per_rank is None else tuple(conf.layers_per_rank),
        links=conf.links,
        sources=conf.sources,
        rates=None if conf.rates is None else from_json(Rates, conf.rates, "gpu.rates"),
        weight_shares={tier.value: size.share for tier, size in sizes.items() if size.share is not None},
    )


def _size(given: Any, field: str, weight_bytes: Callable[[], int] | None) -> _Size:
    """Of a tier. UserError for fewer bytes than any machine has: a unit was forgotten. (Nothing at all is refused by
    the profile.)"""
    if given is None:
        return _Size()
    share = parse_weight_share(given, field)
    if share is None:
        size = parse_bytes(given, field)
        if 0 < size < MIB:
            raise UserError(field, given, "at least 1 MiB", "A plain number is bytes: write a unit, as in 16GB.")
        return _Size(size)
    if weight_bytes is None:
        raise UserError(field, given, "a size such as 2GiB here", "Shares of the weights are for cells of a benchmark.")
    size = round(share * weight_bytes())
    if size < MIB:
        raise UserError(
            field, given, f"a share that is at least 1 MiB: of this model's weights it is {format_bytes(size)}"
        )
    return _Size(size, share)
