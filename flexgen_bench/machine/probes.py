"""What this process has used, as the kernel counts it, and control over cached file pages."""

from __future__ import annotations

import os
import resource
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class IoCounters:
    """Bytes this process has moved (``/proc/self/io``).

    storage_*: bytes fetched from and sent to the block layer; call_*: bytes asked for with read and write
    calls, from the page cache too. Memory-mapped reads are in the first kind only.
    """

    storage_read_bytes: int
    storage_write_bytes: int
    call_read_bytes: int
    call_write_bytes: int

    def __sub__(self, earlier: IoCounters) -> IoCounters:
        old = asdict(earlier)
        return IoCounters(**{name: value - old[name] for name, value in asdict(self).items()})


def io_counters() -> IoCounters | None:
    """The counters up to now; None where the host does not show them."""
    try:
        text = Path("/proc/self/io").read_text()
    except OSError:  # not Linux, or hidden by the container
        return None
    values = dict(line.split(": ") for line in text.splitlines())
    return IoCounters(
        storage_read_bytes=int(values["read_bytes"]),
        storage_write_bytes=int(values["write_bytes"]),
        call_read_bytes=int(values["rchar"]),
        call_write_bytes=int(values["wchar"]),
    )


def peak_resident_bytes() -> int:
    """Highest resident set of this process, mapped file pages included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def anonymous_bytes() -> int | None:
    """What this process holds now besides file pages; None where the host does not show it."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return None
    line = next((line for line in text.splitlines() if line.startswith("RssAnon:")), None)
    return None if line is None else int(line.split()[1]) * 1024


def resident_bytes() -> int | None:
    """Resident set of this process now, mapped file pages included; None where the host does not show it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def drop_cached_pages(folder: Path) -> int:
    """Ask the kernel to forget the cached pages of every file under ``folder``; returns their total size.

    Pages that another control group has cached would otherwise make its reads look free. Files that are
    mapped by a running process keep their pages.
    """
    total = 0
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)  # unwritten pages cannot be dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            total += os.fstat(handle).st_size
        finally:
            os.close(handle)
    return total
