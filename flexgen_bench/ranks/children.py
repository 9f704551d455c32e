"""Ranks of this machine as processes that rank 0 starts, and that do not outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from flexgen_bench.ranks.division import environment_of
from flexgen_bench.ranks.rendezvous import Meeting

_POLL_S = 0.5
_LEAVE_S = 5.0


class Children:
    """The processes of ranks 1 to ``ranks`` - 1. way: to rank 0's door, which nobody else is told."""

    def __init__(self, meeting: Meeting, ranks: int, threads: int, way: str) -> None:
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        try:
            for rank in range(1, ranks):
                self._processes[rank] = _start(meeting, rank, ranks, threads, way)
        except BaseException:
            self.kill()
            raise

    def has_ended(self) -> int | None:
        """A rank whose process has ended; None if all run."""
        return next((rank for rank, process in self._processes.items() if process.poll() is not None), None)

    def ending(self, rank: int) -> str:
        """How a rank's process has ended, in words; "" if it has not, or is not ours to know."""
        process = self._processes.get(rank)
        if process is None:
            return ""
        try:
            status = process.wait(_LEAVE_S)
        except subprocess.TimeoutExpired:
            return ""
        if status == -signal.SIGKILL:
            return "its process was killed by SIGKILL, as the kernel does when memory runs out"
        if status < 0:
            return f"its process was killed by {signal.Signals(-status).name}"
        return f"its process ended with exit status {status}"

    def leave(self) -> None:
        """Wait until all have ended, as they were told to; kill those that have not."""
        deadline = time.monotonic() + _LEAVE_S
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        self.kill()

    def kill(self) -> None:
        """End all at once; when this returns, none is left."""
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()


def _start(meeting: Meeting, rank: int, ranks: int, threads: int, way: str) -> subprocess.Popen[bytes]:
    words: Sequence[str] = [str(rank), str(ranks), meeting.host, str(meeting.port), str(os.getpid())]
    environment = {**os.environ, **environment_of(rank), "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [sys.executable, "-m", "flexgen_bench.ranks", *words], env=environment, stdin=subprocess.PIPE
    )
    assert process.stdin is not None
    # Other users of the machine see a process' words, and can read the store.
    with suppress(OSError), process.stdin as told:  # one that has ended is seen by who waits for it
        told.write(f"{way}\n".encode())
    return process


def end_with(parent: int) -> None:
    """Of a rank's process: end soon after the one that has started it, killed or not, and leave Ctrl-C to that one.

    (The kernel's own way, PR_SET_PDEATHSIG, watches the thread that has started a process, which may end before.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
