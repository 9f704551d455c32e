"""An error that somebody keeps must not keep a job's memory."""

from __future__ import annotations

import traceback
from types import TracebackType


def release_frames(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
    """Forget the local variables of every call that an error has ended; its traceback can still be printed.

    They hold caches, slots and staging buffers, and the error leads to itself by way of the lane that raised it:
    without this the memory of a failed job would come back some time after the error is forgotten, if ever. The
    arguments are those of a context manager's exit.
    """
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        waiting += [one.__cause__, one.__context__]
