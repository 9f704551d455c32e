"""Run one command under the guard, show what it tells, and say how it ended."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from flexgen_bench.core.cell import WeightSource
from flexgen_bench.core.codec import from_json
from flexgen_bench.runner.events import Display, show
from flexgen_bench.runner.memory_cap import MemoryCap

LOG_TAIL_BYTES = 16_384
GUARD_PATIENCE_S = 30.0  # for ending the descendants and removing the control group


@dataclass(frozen=True)
class Ending:
    """How a guarded command ended. returncode: its exit status, negative for a signal, None if the guard
    itself failed; log: the end of what it printed on stdout and stderr."""

    returncode: int | None
    timed_out: bool
    memory_cap: MemoryCap
    log: str


def run_guarded(
    command: Sequence[str],
    workdir: Path,
    display: Display,
    *,
    environment: Mapping[str, str],
    memory_bytes: int | None = None,
    time_limit_s: float | None = None,
) -> Ending:
    """Run ``command`` in its own process group (and memory cap), until it ends or its time is over.

    Its standard output is read as events; what it prints besides goes to ``workdir/log.txt``. When this
    function is left, by an exception too, no process of the command is alive.

    Linux only. The thread that calls this is the one whose end ends the command: the kernel watches threads.
    """
    outcome_path = workdir / "outcome.json"
    outcome_path.unlink(missing_ok=True)
    guard = [sys.executable, "-m", "flexgen_bench.runner.guard", "--parent", str(os.getpid())]
    guard += ["--outcome", str(outcome_path), "--workdir", str(workdir)]
    if memory_bytes is not None:
        guard += ["--memory-bytes", str(memory_bytes)]
    with (workdir / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [*guard, "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=dict(environment),
            start_new_session=True,  # the terminal's Ctrl-C is for us; we end the guard ourselves
        )
        try:
            timed_out = _watch(process, display, time_limit_s)
        finally:
            _end(process)
    if not outcome_path.exists():
        return Ending(None, timed_out, MemoryCap(reason="the guard failed"), _tail(workdir))
    outcome = json.loads(outcome_path.read_text())
    return Ending(
        returncode=outcome["returncode"],
        timed_out=timed_out,
        memory_cap=from_json(MemoryCap, outcome["memory_cap"], "memory_cap"),
        log=_tail(workdir),
    )


def cell_environment(
    threads: int, own: Mapping[str, str] = MappingProxyType({}), weights: WeightSource | None = None
) -> dict[str, str]:
    """The environment of a cell's process: ours, with the settings every system gets alike, and its system's own.

    own: ``Cell.environment``. weights: where they come from, for the preparing process; only a hub model may use the
    network.
    """
    ours = dict(os.environ)
    ours |= {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # Spinning threads stall each other as soon as a neighbour uses a core.
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if weights is not WeightSource.HUB:
        ours["HF_HUB_OFFLINE"] = "1"
    return ours | dict(own)


def _watch(process: subprocess.Popen[bytes], display: Display, time_limit_s: float | None) -> bool:
    """Show events until the pipe closes (False) or the time is over (True)."""
    assert process.stdout is not None
    deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return True
            if not selector.select(left):
                continue
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                return False
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                show(line.decode(errors="replace"), display)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Tell the guard to end everything and wait for it; the kernel ends the rest if the guard must be killed."""
    assert process.stdout is not None
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(GUARD_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _tail(workdir: Path) -> str:
    with (workdir / "log.txt").open("rb") as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - LOG_TAIL_BYTES))
        return log.read().decode(errors="replace")
