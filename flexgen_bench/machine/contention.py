"""How much of the processors other programs took meanwhile: a busy neighbour makes every rate too low, however stable
it looks."""

from __future__ import annotations

import time

import psutil

# Below this nobody needs to be told.
_MUCH = 0.1
_IDLE = ("idle", "iowait", "guest", "guest_nice")  # guests are counted as user time, too


class Others:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._begin = (time.perf_counter(), _busy_s(), _own_s())

    def share(self) -> float:
        """Processor time of others (and of a virtual machine's host, as far as it is told) over all there was, 0 to
        1."""
        begin, busy, own = self._begin
        elapsed = (time.perf_counter() - begin) * (psutil.cpu_count() or 1)
        taken = _busy_s() - busy - (_own_s() - own)
        return min(1.0, max(0.0, taken / elapsed)) if elapsed > 0 else 0.0

    def note(self) -> str | None:
        """A sentence if it was much."""
        share = self.share()
        if share < _MUCH:
            return None
        return f"other programs took {share:.0%} of the processors meanwhile: rates are lower than this machine's own"


def _busy_s() -> float:
    times = psutil.cpu_times()._asdict()
    return float(sum(seconds for name, seconds in times.items() if name not in _IDLE))


def _own_s() -> float:
    own = psutil.Process().cpu_times()
    return float(own.user + own.system)
