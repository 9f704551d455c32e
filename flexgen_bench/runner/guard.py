"""A small process between the suite and a cell, so that nothing of a cell survives either of them.

``python -m flexgen_bench.runner.guard --parent PID --outcome FILE [options] -- COMMAND`` runs COMMAND in a
process group of its own (and in a memory control group if a cap is asked for), waits, and ends every process
that came from it: when COMMAND ends, when the guard is told to stop (SIGTERM), and when the parent is gone,
even by ``kill -9``. It then removes the control group. The guard itself stays outside the cap.

The outcome file is JSON: ``returncode`` (negative: a signal), ``stopped``, ``memory_cap``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil

from flexgen_bench.core.codec import to_json
from flexgen_bench.runner import memory_cap
from flexgen_bench.runner.memory_cap import CapUnavailable, MemoryCap, MemoryGroup

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
POLL_S = 0.05

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(signum: int, parent: int) -> None:
    """Have the kernel send this process ``signum`` when its parent ends; exits if it already has."""
    if _libc.prctl(PR_SET_PDEATHSIG, signum, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)


def main() -> int:
    options = _arguments()
    stop = _StopFlag()
    signal.signal(signal.SIGTERM, stop.set)
    signal.signal(signal.SIGINT, stop.set)
    die_with_parent(signal.SIGTERM, options.parent)
    # Grandchildren whose parent has ended become ours, and so can be found and ended.
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    group, cap = _enter_cap(options)
    kills_before = memory_cap.machine_oom_kills()
    try:
        child = _start(options.command, group)
        try:
            while child.poll() is None and not stop.wanted and os.getppid() == options.parent:
                if group is not None:
                    group.sample()
                time.sleep(POLL_S)
        finally:
            end_all(child, group)
        if group is not None:
            cap = group.result()
        else:
            cap = replace(cap, oom_kills=memory_cap.machine_oom_kills() - kills_before)
    finally:
        left = _remove(group)
    cap = replace(cap, reason="; ".join(filter(None, (cap.reason, left))))
    outcome = {"returncode": child.returncode, "stopped": stop.wanted, "memory_cap": to_json(cap)}
    if os.getppid() != options.parent:
        # Nobody is left to read the outcome or to clean up.
        shutil.rmtree(options.workdir, ignore_errors=True)
        return 1
    partial = options.outcome.with_suffix(".partial")
    partial.write_text(json.dumps(outcome))
    partial.replace(options.outcome)
    return 0


class _StopFlag:
    wanted = False

    def set(self, *_: object) -> None:
        self.wanted = True


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a command and leave none of its processes.")
    parser.add_argument("--parent", type=int, required=True, help="process id of the caller")
    parser.add_argument("--outcome", type=Path, required=True, help="JSON file to write at the end")
    parser.add_argument("--workdir", type=Path, required=True, help="deleted if the caller is gone")
    parser.add_argument("--memory-bytes", type=int, help="cap on memory, page cache included")
    parser.add_argument("--in-scope", action="store_true", help="already inside a systemd scope")
    parser.add_argument("command", nargs="+")
    return parser.parse_args()


def _enter_cap(options: argparse.Namespace) -> tuple[MemoryGroup | None, MemoryCap]:
    """Make the control group; without one, start again inside a systemd scope if there is such a thing."""
    limit: int | None = options.memory_bytes
    if limit is None:
        return None, MemoryCap(reason="no cap was asked for")
    try:
        if options.in_scope:
            return memory_cap.current_group(limit), MemoryCap()
        return memory_cap.create_group(limit, f"flexgen-bench-{os.getpid()}"), MemoryCap()
    except CapUnavailable as refusal:
        reason = str(refusal)
    if not options.in_scope:
        try:
            scope = memory_cap.scope_command(limit)
        except CapUnavailable as refusal:
            reason = f"{reason}; {refusal}"
        else:
            module = ["-m", "flexgen_bench.runner.guard", "--in-scope"]
            os.execv(scope[0], [*scope, sys.executable, *module, *sys.argv[1:]])
    return None, MemoryCap(requested_bytes=limit, reason=reason)


def _remove(group: MemoryGroup | None) -> str:
    """Remove the group. A kernel that refuses must not cost the run its result: the record says so."""
    try:
        if group is not None:
            group.remove()
    except OSError as error:
        return f"the control group could not be removed: {error}"
    return ""


def _start(command: list[str], group: MemoryGroup | None) -> subprocess.Popen[bytes]:
    guard = os.getpid()

    def prepare() -> None:
        os.setpgid(0, 0)
        die_with_parent(signal.SIGKILL, guard)
        if group is not None:
            group.join()

    return subprocess.Popen(command, preexec_fn=prepare)  # noqa: PLW1509  (the guard has one thread)


def end_all(child: subprocess.Popen[bytes], group: MemoryGroup | None) -> None:
    """SIGKILL and reap every descendant, until none is left."""
    while True:
        remaining = psutil.Process().children(recursive=True)
        for process in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if group is not None:
            group.kill()
        child.wait()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        if not remaining:
            return
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
