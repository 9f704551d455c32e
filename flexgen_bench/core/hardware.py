"""A machine: what it holds and how fast its links are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from flexgen_bench.core.codec import OMITTED
from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.rates import Rates, stated_rate
from flexgen_bench.core.slices import Slice
from flexgen_bench.core.tiers import LINKS, PHYSICAL_LINKS, STATED_LINKS, Lane, LaneKind, Site, Tier

# Attention over a KV cache reads all of it, so it cannot be faster than memory; what is stated is rounded.
_ROUNDED = 1.05


class Accelerator(StrEnum):
    """What computes."""

    NONE = "none"  # the host's own cores: the hierarchy is cpu + disk
    CUDA = "cuda"
    EMULATED = "emulated"  # a CPU-backed device with its own arena and throttled links


@dataclass(frozen=True)
class HardwareProfile:
    """Capacities in bytes (None: whatever the local machine has) and link bandwidths in bytes/s.

    ``device_match`` is text that the name of the local GPU must contain, as whole words, for this profile to be
    measurable here.
    ``links`` maps a kind of lane to bytes/s (pinned memory, direct disk I/O); an emulated accelerator's are throttled
    to these. Lanes that share a link (``Lane.link``) share its bandwidth, stated once.
    ``rates`` is what the machine is known to sustain; None if nobody has measured or looked it up. It decides no
    result, so it is no part of a cell's identity. ``sources`` says where each constant comes from.
    ``gpu_memory_is_cap``: a larger card is held to ``gpu_memory_bytes`` (``runner/gpu_cap.py``), so what its driver and
    a process' context take lies outside.
    ``weight_shares``: by tier (``gpu``, ``cpu``, ``disk``), of which share of the model's weights a capacity was asked
    for (0.5: half of them, uncompressed, in the cell's dtype); the capacity itself is in bytes all the same.
    ``count``: devices that work together, each a pipeline rank; ``gpu_memory_bytes`` is one device's, the host's memory
    and disk are shared. ``layers_per_rank``: how many layers each rank has; None: they are divided for it.
    ``tensor_parallel``: devices that share every layer, each with a slice of it, as of ``count`` in all else.
    """

    name: str
    accelerator: Accelerator
    gpu_memory_bytes: int | None = None
    cpu_memory_bytes: int | None = None
    disk_bytes: int | None = None
    device_match: str = ""
    links: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    rates: Rates | None = field(default=None, metadata=OMITTED)
    gpu_memory_is_cap: bool = field(default=False, metadata=OMITTED)
    weight_shares: Mapping[str, float] = field(default_factory=dict, metadata=OMITTED)
    count: int = field(default=1, metadata=OMITTED)
    layers_per_rank: tuple[int, ...] | None = field(default=None, metadata=OMITTED)
    tensor_parallel: int = field(default=1, metadata=OMITTED)

    def __post_init__(self) -> None:
        for name in ("gpu_memory_bytes", "cpu_memory_bytes", "disk_bytes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"gpu.{name}", value, "more than zero bytes")
        _check_ranks(self)
        for tier, share in self.weight_shares.items():
            if tier not in list(Tier):
                raise unknown_choice("gpu.weight_shares", tier, list(Tier))
            if not 0 < share < math.inf:
                raise UserError(f"gpu.weight_shares.{tier}", share, "more than zero, and finite")
        for lane, rate in self.links.items():
            if lane not in STATED_LINKS:
                action = ""
                if lane in LINKS:
                    link = Lane(LaneKind(lane)).link
                    action = f"{lane} shares the link of {link}: state the bandwidth of {link}."
                raise UserError("gpu.links", lane, f"one of {', '.join(map(str, STATED_LINKS))}", action)
            if not 0 < rate < math.inf:
                raise UserError(f"gpu.links.{lane}", rate, "more than zero bytes/s, and finite")
        if self.accelerator is Accelerator.EMULATED and self.gpu_memory_bytes is None:
            raise UserError("gpu.gpu_memory_bytes", None, "given for an emulated accelerator")
        # What was measured has a spread: it may be noisy, but nobody has mistyped it.
        if self.rates is not None and not self.rates.spread:
            _check_links(self, self.rates)
            _check_sites(self.rates)

    @property
    def compute_tier(self) -> Tier:
        return Tier.CPU if self.accelerator is Accelerator.NONE else Tier.GPU

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The lanes of the device that computes and of its host."""
        return Site(self.compute_tier).lanes

    @property
    def ranks(self) -> int:
        """Devices that work together, whether they divide the layers or share them."""
        return max(self.count, self.tensor_parallel)

    @property
    def slices(self) -> tuple[Slice | None, ...]:
        """What each of the devices that share every layer has of it; one of None, which is all, where none do."""
        ranks = self.tensor_parallel
        return tuple(Slice(rank, ranks) for rank in range(ranks)) if ranks > 1 else (None,)

    @property
    def tiers(self) -> tuple[Tier, ...]:
        if self.accelerator is Accelerator.NONE:
            return (Tier.CPU, Tier.DISK)
        return (Tier.GPU, Tier.CPU, Tier.DISK)

    def capacity_bytes(self, tier: Tier) -> int | None:
        """What a tier holds; None: whatever the local machine has."""
        stated = (self.gpu_memory_bytes, self.cpu_memory_bytes, self.disk_bytes)
        return dict(zip((Tier.GPU, Tier.CPU, Tier.DISK), stated, strict=True))[tier]

    def link_rate(self, lane: Lane) -> float | None:
        """Bytes/s of a lane's link: as the profile states, else as measured; None if neither is known."""
        measured = self.rates.links if self.rates is not None else {}
        link = lane.link.kind
        return self.links.get(link, measured.get(link))


def _check_ranks(machine: HardwareProfile) -> None:
    """Raises UserError for a number of ranks that cannot be, or layers for another number of them."""
    for name in ("count", "tensor_parallel"):
        number = getattr(machine, name)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise UserError(f"gpu.{name}", number, "an integer of at least 1")
    if machine.tensor_parallel > 1 and (machine.count > 1 or machine.layers_per_rank is not None):
        raise UserError(
            "gpu.tensor_parallel",
            machine.tensor_parallel,
            f"1 with gpu.count = {machine.count} and gpu.layers_per_rank = {machine.layers_per_rank}",
            "Ranks either share every layer or have layers of their own: leave one of them out.",
        )
    if machine.layers_per_rank is not None and len(machine.layers_per_rank) != machine.count:
        raise UserError(
            "gpu.layers_per_rank",
            list(machine.layers_per_rank),
            f"gpu.count = {machine.count} numbers, one for each rank",
        )


def _check_links(machine: HardwareProfile, rates: Rates) -> None:
    """Raises UserError for stated links that are missing where an accelerator's rates are stated, absurd, or faster
    than the memories at both ends (of a disk's: than host memory)."""
    for kind in PHYSICAL_LINKS:
        where = f"gpu.links.{kind}"
        rate = machine.link_rate(Lane(kind))
        if rate is not None:
            stated_rate(rate, where)
        elif Tier.GPU in rates.sites and machine.compute_tier is Tier.GPU:
            raise UserError(
                where,
                None,
                "given for an accelerator whose rates are given",
                f"State all of {', '.join(map(str, PHYSICAL_LINKS))} in bytes/s, or leave out gpu.rates.",
            )
        ends = {tier: rates.sites[tier].memory for tier in LINKS[kind] if tier in rates.sites}
        if rate is None or not ends:
            continue
        tier = max(ends, key=lambda end: ends[end])
        if rate > ends[tier]:
            raise UserError(
                where,
                rate,
                f"at most gpu.rates.{tier}.memory = {ends[tier]:g} bytes/s",
                "What a link moves is read from or written to that memory; is the unit of one of the two wrong?",
            )


def _check_sites(rates: Rates) -> None:
    """Raises UserError for decode attention that is faster than the memory it reads."""
    for tier, site in rates.sites.items():
        for number, table in site.decode_attention.items():
            for heads, rate in table.items():
                if rate > _ROUNDED * site.memory:
                    raise UserError(
                        f"gpu.rates.{tier}.decode_attention.{number}.{heads}",
                        rate,
                        f"at most gpu.rates.{tier}.memory = {site.memory:g} bytes/s",
                        "It reads the whole KV cache. Change both; or is the unit of one of the two wrong?",
                    )
