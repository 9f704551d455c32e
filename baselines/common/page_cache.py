"""Files that are read through the page cache: whatever memory is left keeps some of them."""

from __future__ import annotations

# Bytes/s that one thread reads through a mapping of a file: a page is fetched when it is touched, with 128 KiB ahead of
# it, and waiting for the disk and copying take turns, so a faster disk is no help beyond that. Fitted: FlexGen's
# OPT-175B on the 5.6 GB/s of ZeRO-Inference's machine (0.33 tokens/s, their README).
MAPPED_READ = 2.0e9


def cached_share(file_bytes: float, spare_bytes: float | None) -> float:
    """The share of files, read from end to end again and again, that is found in ``spare_bytes`` of memory (None: no
    limit).

    All of what fits. Of what does not fit, the oldest pages are dropped first, just before they would be wanted again:
    twice the memory that is missing is lost, nothing is left when the files are twice as large as the memory.
    """
    if spare_bytes is None or file_bytes <= spare_bytes:
        return 1.0
    return max(0.0, 2 * max(spare_bytes, 0.0) / file_bytes - 1)


def read_rate(disk: float, cached: float, share: float) -> float:
    """Bytes/s where ``share`` of the bytes is read at the rate ``cached``, the rest at the rate ``disk``."""
    return 1 / (share / cached + (1 - share) / disk)


def mapped_rate(disk: float, cached: float, share: float, threads: int = 1) -> float:
    """The same of mapped files, of which ``threads`` are read at a time."""
    return read_rate(min(disk, threads * MAPPED_READ), cached, share)
