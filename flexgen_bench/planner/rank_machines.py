"""What each rank of a pipeline has of a machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.rates import Rates, SiteRates, Table
from flexgen_bench.core.tiers import LINKS, NETWORK, Lane, LaneKind, Tier
from flexgen_bench.planner.forecast import contention
from flexgen_bench.planner.simulated_lanes import Contention

_DISK = (LaneKind.DISK_READ, LaneKind.DISK_WRITE)


@dataclass(frozen=True)
class RankMachine:
    """hardware: what a rank has for itself: memory, rates, links; of its host's disk, the whole rate, which it has when
    nobody else uses it. host: ranks with the same number share that disk."""

    hardware: HardwareProfile
    host: int = 0


def machines_of(job: Job) -> tuple[RankMachine, ...]:
    """Of a job: as many machines as it says, each with the devices that its profile counts."""
    count = job.hardware.count
    return tuple(one for host in range(job.num_gpus) for one in in_one_machine(job.hardware, count, host))


def in_one_machine(hardware: HardwareProfile, ranks: int, host: int = 0) -> tuple[RankMachine, ...]:
    """Ranks of one machine. Each has a device with links of its own, and of the host's memory and cores an equal share:
    an emulated device computes on these cores, too. What is known of a network is between machines, so these send each
    other what they do through memory, unless the profile states a link."""
    return (RankMachine(_share(hardware, ranks), host),) * ranks


def searched_on(machine: RankMachine, machines: Sequence[RankMachine]) -> HardwareProfile:
    """What a rank has when all others work, too: of a disk that ranks share, its part."""
    users = sum(other.host == machine.host for other in machines)
    return _with_links(machine.hardware, _DISK, users) if users > 1 else machine.hardware


def contention_of(machines: Sequence[RankMachine]) -> Contention | None:
    """What lanes of ranks, whose devices are the ranks' numbers, take from each other; None: nothing."""
    own = [contention(machine.hardware) for machine in machines]
    hosts = [machine.host for machine in machines]
    shares_disk = len(set(hosts)) < len(hosts)
    return _Contention(own, hosts) if shares_disk or any(one is not None for one in own) else None


class _Contention:
    """Within each rank, and for the disks of hosts."""

    def __init__(self, own: Sequence[Contention | None], hosts: Sequence[int]) -> None:
        self._own, self._hosts = own, hosts
        self._known: dict[tuple[Lane, ...], Mapping[Lane, float]] = {}  # of one rank's lanes

    def __call__(self, lanes: Iterable[Lane]) -> Mapping[Lane, float]:
        of_rank: dict[int, list[Lane]] = {}
        disks: dict[tuple[int, LaneKind], list[Lane]] = {}
        for lane in lanes:
            of_rank.setdefault(lane.device, []).append(lane)
            if lane.kind in _DISK:
                disks.setdefault((self._hosts[lane.device], lane.kind), []).append(lane)
        speed: dict[Lane, float] = {}
        for rank, active in of_rank.items():
            speed |= self._of_rank(rank, tuple(active))
        for users in disks.values():
            speed.update({lane: speed[lane] / len(users) for lane in users})
        return speed

    def _of_rank(self, rank: int, lanes: tuple[Lane, ...]) -> Mapping[Lane, float]:
        if lanes not in self._known:
            own = self._own[rank]
            self._known[lanes] = dict.fromkeys(lanes, 1.0) if own is None else own(lanes)
        return self._known[lanes]


def _share(hardware: HardwareProfile, ranks: int) -> HardwareProfile:
    hardware = replace(hardware, count=1, layers_per_rank=None)
    if ranks == 1:
        return hardware

    def part(size: int | None) -> int | None:
        return None if size is None else size // ranks

    shared = replace(hardware, cpu_memory_bytes=part(hardware.cpu_memory_bytes), disk_bytes=part(hardware.disk_bytes))
    rates = hardware.rates
    if rates is None:
        return shared
    of_host = (Tier.CPU,) if hardware.accelerator is Accelerator.CUDA else tuple(rates.sites)
    sites = {tier: _slower(site, ranks) if tier in of_host else site for tier, site in rates.sites.items()}
    links = {kind: rate for kind, rate in rates.links.items() if LaneKind(kind) not in NETWORK}
    return _within_memories(replace(shared, rates=None), replace(rates, sites=sites, links=links))


def _within_memories(hardware: HardwareProfile, rates: Rates) -> HardwareProfile:
    """With these rates, and no stated link faster than what is left of the memories that it goes between."""
    links = dict(hardware.links)
    for name, rate in links.items():
        ends = [rates.sites[tier].memory for tier in LINKS.get(LaneKind(name), ()) if tier in rates.sites]
        if ends:
            links[name] = min(rate, max(ends))
    return replace(hardware, links=links, rates=rates)


def _slower(site: SiteRates, times: int) -> SiteRates:
    """What it sustains on so small a part of its cores. What steps and operators cost beside their work stays."""

    def part(table: Table) -> dict[int, float]:
        return {size: rate / times for size, rate in table.items()}

    def parts(formats: Mapping[str, Mapping[int, Table]]) -> dict[str, dict[int, dict[int, float]]]:
        return {name: {width: part(table) for width, table in widths.items()} for name, widths in formats.items()}

    return replace(
        site,
        matrix=parts(site.matrix),
        memory=site.memory / times,
        prefill_attention=part(site.prefill_attention),
        decode_attention={name: part(table) for name, table in site.decode_attention.items()},
        unpack=site.unpack / times,
        torch_matrix=parts(site.torch_matrix),
    )


def _with_links(hardware: HardwareProfile, kinds: Sequence[LaneKind], users: int) -> HardwareProfile:
    rates = {kind: hardware.link_rate(Lane(kind)) for kind in kinds}
    part = {str(kind): rate / users for kind, rate in rates.items() if rate}
    return replace(hardware, links={**hardware.links, **part})
