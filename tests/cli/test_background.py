"""What is started in the background of a script has SIGINT ignored, and so have its children: nothing may wait for a
Ctrl-C that is dropped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flexgen_bench.core.processes import process_pool

ROOT = Path(__file__).resolve().parents[2]
# Each sends SIGINT to a process: this one, or one that a test starts.
INTERRUPTED = (
    "planner/test_choose.py::test_an_interrupted_search_leaves_no_process",
    "engine/test_caller_failures.py::test_an_interrupt_in_the_progress_callback",
    "runner/test_runner.py::test_ending_the_suite_leaves_no_process_and_valid_records",
)


def ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", INTERRUPTED)
def test_tests_that_interrupt_pass_in_the_background(name: str) -> None:
    """``make test &`` in a script waited for ever: the search that was to be interrupted slept on."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{name}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=ignore_interrupts,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout[-3000:]


HANGS = """
import time
def test_hangs():
    while True:
        try:
            time.sleep(1)
        except BaseException:
            pass
def test_another():
    pass
"""


def test_a_test_that_hangs_is_ended_and_the_others_run(tmp_path: Path) -> None:
    """The limit of pyproject.toml ends it, also where the test swallows what is raised in it."""
    tmp_path.joinpath("test_it.py").write_text(HANGS)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "1",
            "-c",
            str(ROOT / "pyproject.toml"),
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(tmp_path),
            "--timeout",
            "2",
            str(tmp_path),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout[-3000:]
    assert "crashed while running" in done.stdout


def test_every_test_has_a_limit(pytestconfig: pytest.Config) -> None:
    assert 0 < float(pytestconfig.getini("timeout")) <= 600


def handler() -> str:
    return str(signal.getsignal(signal.SIGINT))


def test_workers_ignore_what_their_parent_ignores() -> None:
    """They ended at a Ctrl-C that was meant for the job in the foreground, while the process that had started them went
    on."""
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with process_pool(1) as pool:
            pid = pool.submit(os.getpid).result(timeout=120)
            os.kill(pid, signal.SIGINT)
            assert pool.submit(handler).result(timeout=120) == str(signal.SIG_IGN)
            assert pool.submit(os.getpid).result(timeout=120) == pid
    finally:
        signal.signal(signal.SIGINT, before)
