"""Work of native functions over as many threads as torch would use.

Plain Python threads: ctypes releases the interpreter lock, and a second OpenMP runtime next to torch's is asking for
trouble.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def share(total: int, work: Callable[[int, int], None], at_least: int = 1) -> None:
    """Run ``work(start, stop)`` over pieces of range(total), one per thread, and wait for all of them.

    No piece is smaller than ``at_least`` (the last may be), so that little work stays on the calling thread. Handing a
    piece to another thread takes some 50 microseconds. The first error of a piece is raised here.
    """
    pieces = min(torch.get_num_threads(), -(-total // at_least))
    if pieces <= 1:
        if total:
            work(0, total)
        return
    edges = [total * i // pieces for i in range(pieces + 1)]
    others = [_pool().submit(work, a, b) for a, b in itertools.pairwise(edges[1:])]
    try:
        work(edges[0], edges[1])
    finally:
        for other in others:
            other.exception()  # the pieces use the caller's memory: none may outlive the call
    for other in others:
        other.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="native")


# A forked child has the pool but none of its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
