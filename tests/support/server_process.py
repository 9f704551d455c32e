"""A real server process on loopback, for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.documented import ROOT


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """``flexgen-bench serve`` with words; ``url`` is where it is."""

    def __init__(self, model: Path, state: Path, *arguments: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        words = [f"model={model}", "name=tiny", "gpu=cpu", "threads=1", f"cache_dir={model.parent / 'cache'}"]
        command = [sys.executable, "-m", "flexgen_bench", "serve", "--port", str(port), "--state", str(state), *words]
        self.state = state
        self.log = state.with_name(f"{state.name}.log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log
            )

    def wait_until_up(self, seconds: float = 200) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(f"not up: {self.log.read_text()}")

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def memory(self) -> int:
        """Resident bytes."""
        import psutil

        return int(psutil.Process(self.process.pid).memory_info().rss)

    def stop(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=120)


@contextmanager
def serving(model: Path, state: Path, *arguments: str) -> Iterator[ServerProcess]:
    server = ServerProcess(model, state, *arguments)
    try:
        server.wait_until_up()
        yield server
    finally:
        server.process.kill()
        server.process.wait()
