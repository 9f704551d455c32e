"""Host memory that a job leaves to the next one.

Fresh memory is expensive where it is first touched: a page fault for every 4 KiB or 2 MiB (0.3 GB/s were seen on a
virtual machine, a hundred times less than the memory does), and with a GPU it has to be page-locked. Jobs of a kind
need the same blocks again.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class KeptMemory:
    """Blocks that nobody uses, by their size in bytes. All are released as soon as a job wants one that is not among
    them, so that there is never more memory in use than a plan says."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[Tensor]] = {}

    def take(self, num_bytes: int) -> Tensor | None:
        """A block of exactly this size, with anything in it; None if there is none, and none is kept from then on."""
        if self._blocks.get(num_bytes):
            return self._blocks[num_bytes].pop()
        self.release()
        return None

    def keep(self, blocks: Iterable[Tensor]) -> None:
        """Take over blocks that are no longer used."""
        for block in blocks:
            self._blocks.setdefault(block.numel(), []).append(block)

    def release(self) -> None:
        """Give all of it back to the system."""
        self._blocks.clear()
