"""Where is measured: a device, and memory on it that is larger than its caches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import MIB, PAGE, aligned
from flexgen_bench.engine.device import Device

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from flexgen_bench.calibrate.effort import SiteEffort

# How many times the largest cache: what is read in turns has left it long before it is read again.
_CACHES = 3
_PATTERN_BYTES = MIB
# Views of a unit's tensors are made for each copy; more copies than this tell nothing more.
_MOST_COPIES = 64


@dataclass(frozen=True)
class Site:
    """A device, its tier, and the threads it computes with."""

    tier: Tier
    device: Device

    @staticmethod
    def open(tier: Tier, threads: int) -> Site:
        """The host's cores, or the CUDA device."""
        kind = Accelerator.CUDA if tier is Tier.GPU else Accelerator.NONE
        return Site(tier, Device.open(HardwareProfile(str(tier), kind), threads))

    def settle(self) -> None:
        """Wait for what was issued; on a processor nothing is."""
        self.device.settle()

    def free_bytes(self) -> int:
        if self.device.is_cuda:
            import torch

            return int(torch.cuda.mem_get_info()[0])
        return int(psutil.virtual_memory().available)

    def cache_bytes(self) -> int:
        """Of the largest cache."""
        if self.device.is_cuda:
            import torch

            return int(torch.cuda.get_device_properties(0).L2_cache_size)
        folder = Path("/sys/devices/system/cpu/cpu0/cache")
        sizes = [_size(path) for path in folder.glob("index*/size")]
        return max(sizes, default=32 * MIB)


class ProbeMemory:
    """Memory whose contents take turns. Every two bytes of it are an ordinary number, not too large and not denormal,
    as float16, as bfloat16 and as half of a float32, so any format can be read from anywhere in it. Whoever writes into
    it keeps it so."""

    def __init__(self, site: Site, effort: SiteEffort, largest_layer: int) -> None:
        """largest_layer: bytes of the largest layer that will be laid into it; it is left out if there is no room for
        it."""
        import torch

        enough = max(effort.least_bytes, _CACHES * site.cache_bytes(), largest_layer)
        limit = max(effort.most_bytes, largest_layer)
        size = aligned(min(enough, limit, site.free_bytes() // 3))
        self.site = site
        self.bytes: Tensor = site.device.allocate(site.tier, size)
        generator = torch.Generator().manual_seed(0)
        pattern = torch.randint(0, 256, (_PATTERN_BYTES,), dtype=torch.uint8, generator=generator)
        pattern[1::2] = (pattern[1::2] & 0x80) | 0x3A  # sign, and an exponent near the middle
        pattern = pattern.to(self.bytes.device)
        for start in range(0, size, _PATTERN_BYTES):
            part = self.bytes[start : start + _PATTERN_BYTES]
            part.copy_(pattern[: part.numel()])
        self._pattern = pattern
        site.settle()

    @property
    def size(self) -> int:
        return self.bytes.numel()

    def copies(self, num_bytes: int) -> list[Tensor]:
        """Disjoint pieces of so many bytes, spread over all of it; empty if none fits."""
        step = aligned(num_bytes, PAGE)
        count = self.size // step
        every = max(1, count // _MOST_COPIES) * step
        return [self.bytes[at : at + step] for at in range(0, count * step, every)]

    def turns(self, num_bytes: int) -> Iterator[Tensor]:
        """The pieces, over and over."""
        pieces = self.copies(num_bytes)
        assert pieces, "asked for more than there is"
        return cycle(pieces)

    def numbers(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of its own with the same kind of numbers."""
        import torch

        tensor = torch.empty(shape, dtype=dtype, device=self.bytes.device)
        flat = tensor.view(-1).view(torch.uint8)
        for start in range(0, flat.numel(), _PATTERN_BYTES):
            part = flat[start : start + _PATTERN_BYTES]
            part.copy_(self._pattern[: part.numel()])
        return tensor


def _size(path: Path) -> int:
    """``266240K`` -> bytes."""
    try:
        text = path.read_text().strip()
    except OSError:
        return 0
    units: dict[str, Any] = {"K": 2**10, "M": 2**20, "G": 2**30}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    return int(number) * unit if number.isdigit() else 0
