"""Reads and writes that bypass the page cache, several requests in flight.

Offsets, lengths and buffers are multiples of 4096 bytes. Where the file system refuses O_DIRECT, the file is read
through the page cache, the pages are dropped after use, and ``direct`` is False so that a record can say so.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from torch import Tensor

from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.units import MIB, PAGE, format_bytes

# Chosen by measurement (docs/notes/disk.md): larger requests and more threads gain nothing on the disks tried.
CHUNK_BYTES = 4 * MIB
IN_FLIGHT = 4

# Told how many bytes, from the start of what is read, have arrived.
Arrived = Callable[[int], None]


class DirectFile:
    """One file, opened for direct I/O."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        self.path = path
        self.direct = True
        try:
            self._fd = os.open(path, flags | os.O_DIRECT, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.direct = False
            self._fd = os.open(path, flags, 0o600)
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="disk")

    def reserve(self, num_bytes: int) -> None:
        """Make the file this large now, so that a full disk is found before the run and not in the middle of it."""
        try:
            os.posix_fallocate(self._fd, 0, num_bytes)
        except OSError as error:
            raise disk_error(error, self.path, f"reserve {format_bytes(num_bytes)}") from error

    def read(self, offset: int, into: Tensor, arrived: Arrived = lambda count: None) -> None:
        """Fill ``into`` (uint8, page-aligned) from ``offset``; StoreError if the file ends early.

        ``arrived`` is called with how many bytes of ``into``, from its start, are there, each time there are more, on
        the calling thread and while the rest is being read: whoever looks at all of them (a checksum) need not wait for
        the end.
        """
        self._in_chunks(offset, into, self._read_chunk, arrived)

    def write(self, offset: int, data: Tensor) -> None:
        """Write ``data`` (uint8, page-aligned) at ``offset``; StoreError on a full disk."""
        self._in_chunks(offset, data, self._write_chunk, lambda count: None)

    def close(self) -> None:
        if self._fd >= 0:
            self._pool.shutdown(wait=True)
            os.close(self._fd)
            self._fd = -1

    def _in_chunks(
        self, offset: int, buffer: Tensor, work: Callable[[int, memoryview], None], arrived: Arrived
    ) -> None:
        view: memoryview = buffer.numpy().data
        if len(view) <= CHUNK_BYTES:
            work(offset, view)
            arrived(len(view))
            return
        starts = range(0, len(view), CHUNK_BYTES)
        pieces = [self._pool.submit(work, offset + start, view[start : start + CHUNK_BYTES]) for start in starts]
        try:
            for start, piece in zip(starts, pieces, strict=True):
                piece.result()
                arrived(min(start + CHUNK_BYTES, len(view)))
        except BaseException:
            # The buffer is the caller's again once this has returned: nothing may still be written to it.
            for piece in pieces:
                piece.cancel()
            wait(pieces)
            raise

    def _read_chunk(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise disk_error(error, self.path, f"read at byte {offset + done}") from error
            done += count
            # A direct read stops off a page's boundary only at the end of the file, and cannot go on from there.
            if count == 0 or (self.direct and done < len(view) and done % PAGE):
                raise StoreError(
                    f"{self.path} ends at byte {offset + done}, {len(view) - done} bytes too early: "
                    "the file is truncated. Delete it and let it be made again."
                )
        if not self.direct:
            os.posix_fadvise(self._fd, offset, len(view), os.POSIX_FADV_DONTNEED)

    def _write_chunk(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            doing = f"write at byte {offset + done}"
            try:
                count = os.pwritev(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise disk_error(error, self.path, doing) from error
            if count == 0:
                raise disk_error(OSError(errno.EIO, "nothing was written"), self.path, doing)
            done += count


def disk_error(error: OSError, path: Path, doing: str) -> StoreError:
    """A disk's refusal in words: what was being done, where, and what helps."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = os.statvfs(path.parent if path.parent.exists() else Path("/"))
        left = format_bytes(free.f_bavail * free.f_frsize)
        return StoreError(f"disk full: could not {doing} in {path} ({left} left). Free space or use another directory.")
    advice = _ADVICE.get(error.errno or 0, "Use another directory.")
    return StoreError(f"could not {doing} in {path}: {error.strerror} (errno {error.errno}). {advice}")


_ADVICE = {
    errno.EIO: "The disk fails: look at the kernel's log (dmesg), and use a directory on another disk.",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f), or use another file system.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
}
