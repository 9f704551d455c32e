"""A process that does what a tracker must not: import, wait, crash. Orders go in as JSON lines, answers come out.

What makes the promise of ``Tracker`` hold: a missing package, a full disk, a server that never answers or an exit hook
that waits for one end with the process, and nothing is waited for while a cell is measured.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CHUNK = 1 << 16


class Sender:
    """``python -m module``: reads orders from standard input, answers each that is asked by one JSON line with its
    ``problem`` ("" if there is none) on standard output.

    log: gets what it prints on standard error, for whoever looks for the cause. Raises OSError if it cannot be started.
    """

    def __init__(self, module: str, environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=os.environ | dict(environment),
                # A session of its own, so that helper processes can be ended with it.
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._unsent = self._answers = b""

    def ask(self, order: Mapping[str, Any], timeout_s: float) -> str:
        """Have an order done, after all that were told; what went wrong, "" if nothing did."""
        deadline = time.monotonic() + timeout_s
        self._unsent += _line(order)
        try:
            while self._unsent:
                if not self._wait(self._in, selectors.EVENT_WRITE, deadline):
                    return self._late(timeout_s)
                self._push()
            while b"\n" not in self._answers:
                if not self._wait(self._out, selectors.EVENT_READ, deadline):
                    return self._late(timeout_s)
                piece = os.read(self._out, _CHUNK)
                if not piece:
                    return self._how_it_ended()
                self._answers += piece
        except BrokenPipeError:
            return self._how_it_ended()
        answer, _, self._answers = self._answers.partition(b"\n")
        return str(json.loads(answer)["problem"])

    def tell(self, order: Mapping[str, Any]) -> bool:
        """Give an order without waiting for anything; whether there was room for it."""
        try:
            self._push()
            if self._unsent:  # it is behind: what comes meanwhile is dropped, not stored
                return False
            self._unsent = _line(order)
            self._push()
        except BrokenPipeError:
            return False
        return True

    def end(self) -> None:
        """End the process and all that came from it, at once. May be called again."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # everything in it has ended by itself
        finally:
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    os.set_blocking(pipe.fileno(), True) if not pipe.closed else None
                    pipe.close()

    def _push(self) -> None:
        """As much of what is unsent as there is room for."""
        while self._unsent:
            try:
                self._unsent = self._unsent[os.write(self._in, self._unsent[:_CHUNK]) :]
            except BlockingIOError:
                return

    def _wait(self, fd: int, event: int, deadline: float) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(fd, event)
            return bool(selector.select(max(0.0, deadline - time.monotonic())))

    def _late(self, timeout_s: float) -> str:
        return f"no end after {timeout_s:g} s"

    def _how_it_ended(self) -> str:
        status = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ended with status {status}"


def _line(order: Mapping[str, Any]) -> bytes:
    return (json.dumps(order, default=str) + "\n").encode()
