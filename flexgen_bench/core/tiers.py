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
    H2D = "h2d"  # cpu -> gpu
    D2H = "d2h"  # gpu -> cpu
    GPU = "gpu"
    CPU = "cpu"


# The lanes that move bytes, and between which tiers: a link is a directed pair of tiers.
LINKS: dict[Lane, tuple[Tier, Tier]] = {
    Lane.DISK_READ: (Tier.DISK, Tier.CPU),
    Lane.DISK_WRITE: (Tier.CPU, Tier.DISK),
    Lane.H2D: (Tier.CPU, Tier.GPU),
    Lane.D2H: (Tier.GPU, Tier.CPU),
}
