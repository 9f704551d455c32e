"""An emulated link: transfers take as long as a stated bandwidth allows, and no longer, whichever lanes share it."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass

_NO_BYTES = 1e-6  # less than this is left over from rounding


@dataclass(slots=True, eq=False)
class Transfer:
    """On its way over a link. left: bytes still to be moved when the link's clock stood where it stands."""

    left: float
    begin_s: float
    end_s: float = math.inf


class Link:
    """A bandwidth. Transfers that are under way at the same time have equal parts of it, one that is alone has all of
    it.

    That is computed: the link has a clock, which stands at the last begin or end of a transfer and so never runs ahead
    of the real one.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._active: list[Transfer] = []
        self._clock_s = -math.inf
        self._guard = threading.Lock()

    def begin(self, count: int, at_s: float) -> Transfer:
        """Let ``count`` bytes begin at a moment that may have passed, or as soon after it as what has been moved since
        allows."""
        with self._guard:
            self._advance(at_s)
            self._clock_s = max(self._clock_s, at_s)
            transfer = Transfer(count, self._clock_s)
            self._active.append(transfer)
            return transfer

    def finish(self, transfer: Transfer) -> float:
        """Sleep until it is over. Returns when that was."""
        while True:
            with self._guard:
                end_s = self._end_of(transfer)
                left_s = end_s - time.perf_counter()
                if left_s <= 0:
                    self._advance(end_s)
                    return end_s
            time.sleep(left_s)

    def _end_of(self, transfer: Transfer) -> float:
        """Unless another one begins, which only makes it later."""
        if transfer not in self._active:
            return transfer.end_s
        # Until then each of the others moves as much as this one, or all that it has.
        count = sum(min(transfer.left, other.left) for other in self._active)
        return self._clock_s + count / self.bytes_per_s

    def _advance(self, to_s: float) -> None:
        """Move what can be moved until ``to_s``, or until nothing is left."""
        while self._active and self._clock_s < to_s:
            part = self.bytes_per_s / len(self._active)
            least = min(transfer.left for transfer in self._active)
            end_s = self._clock_s + least / part
            moved = least if end_s <= to_s else (to_s - self._clock_s) * part
            self._clock_s = min(end_s, to_s)
            for transfer in self._active:
                transfer.left -= moved
                if transfer.left <= _NO_BYTES:
                    transfer.end_s = self._clock_s
            self._active = [transfer for transfer in self._active if transfer.left > _NO_BYTES]


class Throttle:
    """Holds up the thread of one lane until its transfers would be over.

    A sleep ends late, by tens of microseconds and more on a busy machine. What is late is not lost: a transfer that was
    waiting for its lane begins, on the link, where the one before ended, so that many short ones take what they should
    in all.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._free_at_s = math.inf  # until the first transfer there is nothing to catch up with

    def begin(self, count: int, was_waiting: bool) -> Transfer:
        """To be called before ``count`` bytes are copied. was_waiting: they could have begun as soon as the lane was
        free."""
        now_s = time.perf_counter()
        return self._link.begin(count, min(now_s, self._free_at_s) if was_waiting else now_s)

    def hold(self, transfer: Transfer) -> tuple[float, float]:
        """To be called when they have been copied: sleep until they would have been moved.

        Copying for real may take longer than the link would: then the copy counts, and nothing is caught up. Returns
        when the transfer began and ended.
        """
        copied_s = time.perf_counter()
        self._free_at_s = max(self._link.finish(transfer), copied_s)
        return transfer.begin_s, self._free_at_s
