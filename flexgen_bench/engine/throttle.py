"""An emulated link: transfers take as long as a stated bandwidth allows, and no longer."""

from __future__ import annotations

import math
import time


class Throttle:
    """Holds up the thread of a lane until its link would be done.

    A sleep ends late, by tens of microseconds and more on a busy machine. What is late is not lost: a transfer that was waiting
    for the link begins, on the link, where the one before ended, so that many short ones take what they should in all.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_at_s = math.inf  # until the first transfer there is nothing to catch up with

    def hold(self, count: int, begun_s: float, was_waiting: bool) -> tuple[float, float]:
        """Sleep until ``count`` bytes would be over, for a transfer that the lane began at ``begun_s``.

        was_waiting: it could have begun as soon as the link was free. Copying for real may take longer than the
        link would: then the copy counts, and nothing is caught up. Returns when the transfer began and ended on the link.
        """
        begin_s = min(begun_s, self._free_at_s) if was_waiting else begun_s
        end_s = max(begin_s + count / self.bytes_per_s, time.perf_counter())
        while (left := end_s - time.perf_counter()) > 0:
            time.sleep(left)
        self._free_at_s = end_s
        return begin_s, end_s
