"""A machine: what it holds and how fast its links are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.rates import Rates
from flexgen_bench.core.tiers import LINKS, Lane, Tier


class Accelerator(StrEnum):
    """What computes."""

    NONE = "none"  # the host's own cores: the hierarchy is cpu + disk
    CUDA = "cuda"
    EMULATED = "emulated"  # a CPU-backed device with its own arena and throttled links


@dataclass(frozen=True)
class HardwareProfile:
    """Capacities in bytes (None: whatever the local machine has) and link bandwidths in bytes/s.

    ``device_match`` is text that the name of the local GPU must contain for this profile to be measurable here.
    ``links`` maps a lane to bytes/s (pinned memory, direct disk I/O); an emulated accelerator's are throttled to these.
    ``rates`` is what the machine is known to sustain; None if nobody has measured or looked it up. It decides no result, so it is no part
    of a cell's identity. ``sources`` says where each constant comes from.
    """

    name: str
    accelerator: Accelerator
    gpu_memory_bytes: int | None = None
    cpu_memory_bytes: int | None = None
    disk_bytes: int | None = None
    device_match: str = ""
    links: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    rates: Rates | None = None

    def __post_init__(self) -> None:
        for name in ("gpu_memory_bytes", "cpu_memory_bytes", "disk_bytes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"gpu.{name}", value, "more than zero bytes")
        for lane, rate in self.links.items():
            if lane not in {str(known) for known in LINKS}:
                raise UserError("gpu.links", lane, f"one of {', '.join(map(str, LINKS))}")
            if not rate > 0:
                raise UserError(f"gpu.links.{lane}", rate, "more than zero bytes/s")
        if self.accelerator is Accelerator.EMULATED and self.gpu_memory_bytes is None:
            raise UserError("gpu.gpu_memory_bytes", None, "given for an emulated accelerator")

    @property
    def compute_tier(self) -> Tier:
        return Tier.CPU if self.accelerator is Accelerator.NONE else Tier.GPU

    @property
    def compute_lane(self) -> Lane:
        return Lane.CPU if self.accelerator is Accelerator.NONE else Lane.GPU

    @property
    def tiers(self) -> tuple[Tier, ...]:
        if self.accelerator is Accelerator.NONE:
            return (Tier.CPU, Tier.DISK)
        return (Tier.GPU, Tier.CPU, Tier.DISK)

    def link_rate(self, lane: Lane) -> float | None:
        """Bytes/s of a link: as the profile states, else as measured; None if neither is known."""
        measured = self.rates.links if self.rates is not None else {}
        return self.links.get(lane, measured.get(lane))

    def to_dict(self) -> dict[str, Any]:
        """``rates`` only where there are any: records from before they existed read the same."""
        data = asdict(replace(self, rates=None))
        data |= {"links": dict(self.links), "sources": dict(self.sources)}
        data["accelerator"] = self.accelerator.value
        del data["rates"]
        return data if self.rates is None else data | {"rates": self.rates.to_dict()}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> HardwareProfile:
        rates = data.get("rates")
        known = data | {"accelerator": Accelerator(data["accelerator"])}
        return HardwareProfile(
            **(known | {"rates": None if rates is None else Rates.from_dict(rates)})
        )
