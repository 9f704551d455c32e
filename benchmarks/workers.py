"""Systems that are compared in turns, each in a process of its own that stays loaded: a line comes in, what was
measured goes out as a line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

READY = "ready"
END_S = 60
# How often GNU's OpenMP looks before a waiting thread sleeps, where OMP_WAIT_POLICY says nothing. This package makes
# that passive in every process that imports it; a count overrules it.
DEFAULT_SPINS = "300000"


def answer(measure: Callable[[str], Mapping[str, Any]]) -> None:
    """In the worker, once it is loaded: measure for each line until there are no more."""
    print(READY, flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(line.strip())), flush=True)


class Worker:
    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._name, self._process = name, process
        self._in, self._out = process.stdin, process.stdout

    def wait_until_ready(self) -> None:
        """Whatever it says before is passed over. RuntimeError if it ends instead."""
        if not any(line.strip() == READY for line in self._out):
            raise RuntimeError(f"{self._name} did not start")

    def ask(self, line: str | int = "") -> Mapping[str, Any]:
        """One turn. RuntimeError if it ends in it."""
        self._in.write(f"{line}\n")
        self._in.flush()
        answered = self._out.readline()
        if not answered:
            raise RuntimeError(f"{self._name} ended in its turn")
        measured: Mapping[str, Any] = json.loads(answered)
        return measured

    def end(self) -> None:
        self._in.close()
        try:
            self._process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def worker(
    name: str, command: Sequence[str], ours: bool, at_start: Callable[[], None] | None = None
) -> Iterator[Worker]:
    """Loaded and waiting. ours: others' OpenMP threads wait as they do by default, ours as this project sets them.
    at_start: called in the new process."""
    environment = dict(os.environ)
    if not ours:
        environment = {k: v for k, v in environment.items() if not k.startswith("OMP_")}
        environment["GOMP_SPINCOUNT"] = DEFAULT_SPINS
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=at_start,  # noqa: PLW1509  (this process has one thread)
    )
    started = Worker(name, process)
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.end()
