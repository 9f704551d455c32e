"""Work for several processes at once, none of which outlives the one that asked."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.reduction import ForkingPickler
from types import MappingProxyType
from typing import Any


def _frozen(mapping: dict[Any, Any]) -> Mapping[Any, Any]:
    return MappingProxyType(mapping)


def _thawed(frozen: Mapping[Any, Any]) -> tuple[Any, ...]:
    return _frozen, (dict(frozen),)


# Configuration that cannot be changed travels, too.
ForkingPickler.register(MappingProxyType, _thawed)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def process_pool(workers: int, shared: Any = None) -> Iterator[ProcessPoolExecutor]:
    """So many new processes. What has not begun when the block ends with an exception is dropped. shared: what each
    process finds in ``shared_memory()``, such as an array of ``multiprocessing.sharedctypes``."""
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_belong_to, initargs=(os.getpid(), shared)
    ) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_shared: list[Any] = []


def shared_memory() -> Any:
    """What the process that made this one shares with it; None if nothing, or if this one was not made by
    ``process_pool``."""
    return _shared[0] if _shared else None


def _belong_to(parent: int, shared: Any) -> None:
    """End soon after the one that started this process, even if that one is killed; at Ctrl-C, which both get, at once
    and without a word.

    A parent that ignores Ctrl-C (nohup, the background of a script) goes on working, and so does this process, which
    has inherited that.
    """
    _shared[:] = [shared]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
