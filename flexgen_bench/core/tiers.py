"""The memory hierarchy and the resources that work on it."""

from __future__ import annotations

from enum import StrEnum


class Tier(StrEnum):
    """A level of the memory hierarchy, fastest first."""

    GPU = "gpu"
    CPU = "cpu"
    DISK = "disk"


class Lane(StrEnum):
    """A resource that does one thing at a time, in order."""

    DISK_READ = "disk_read"  # disk -> cpu
    DISK_WRITE = "disk_write"  # cpu -> disk
    H2D = "h2d"  # cpu -> gpu: all but weights
    H2D_WEIGHTS = "h2d_weights"  # cpu -> gpu: weights, over the link of h2d
    D2H = "d2h"  # gpu -> cpu
    GPU = "gpu"
    CPU = "cpu"


# The lanes that move bytes, and between which tiers: a link is a directed pair of tiers.
LINKS: dict[Lane, tuple[Tier, Tier]] = {
    Lane.DISK_READ: (Tier.DISK, Tier.CPU),
    Lane.DISK_WRITE: (Tier.CPU, Tier.DISK),
    Lane.H2D: (Tier.CPU, Tier.GPU),
    Lane.H2D_WEIGHTS: (Tier.CPU, Tier.GPU),
    Lane.D2H: (Tier.GPU, Tier.CPU),
}


def link_of(lane: Lane) -> Lane:
    """The lane after which the link that ``lane`` works on is named: another one only where two share a link."""
    return Lane.H2D if lane is Lane.H2D_WEIGHTS else lane


# One lane of each link: what bandwidths are stated for.
PHYSICAL_LINKS = tuple(lane for lane in LINKS if link_of(lane) is lane)
