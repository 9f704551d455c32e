"""What a live dashboard costs while a cell runs: one report of progress, one moment, and the process that sends it.

``python benchmarks/live_history.py [--seconds 30]`` prints microseconds, and processor seconds of the sending process
and its helper (wandb-core, offline) at a row a second. Needs the package wandb for the last figure.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import psutil

from flexgen_bench.core.moment import JobState
from flexgen_bench.runner.events import Emitter
from flexgen_bench.runner.moments import Moments
from flexgen_bench.trackers.base import TrackedResult, TrackedRun
from flexgen_bench.trackers.wandb_tracker import WandbOptions, WandbTracker

LANES = ("disk_read", "disk_write", "h2d", "h2d_weights", "d2h", "gpu", "cpu")
STATE = JobState(
    1000,
    *(8, 0, 16, 40),
    {"cpu": 10**10, "gpu": 10**10, "disk": 10**11},
    {"cpu": 10**10, "gpu": 10**10, "disk": 10**11},
    dict.fromkeys(LANES[:5], 10**12),
    dict.fromkeys(LANES, 123.456),
)


def report_us(calls: int = 200_000) -> tuple[float, float]:
    """Microseconds of one report of progress that tells nothing, and of one moment that is told."""
    read, write = os.pipe()
    drain = threading.Thread(target=lambda: [None for _ in iter(lambda: os.read(read, 65536), b"")])
    drain.start()
    moments = Moments(Emitter(write), lambda: STATE)
    moments.begin("measure")
    begun = time.perf_counter()
    for done in range(calls):
        moments.tokens("decode", done, calls)
    per_report = (time.perf_counter() - begun) / calls
    begun = time.perf_counter()
    for _ in range(2000):
        moments.end()
    per_moment = (time.perf_counter() - begun) / 2000
    os.close(write)
    drain.join()
    os.close(read)
    return per_report * 1e6, per_moment * 1e6


def sender_share(seconds: float) -> tuple[float, float]:
    """Processor seconds per second of the sending process and its helpers at a row a second, and their resident MiB."""
    with tempfile.TemporaryDirectory() as folder:
        tracker = WandbTracker(WandbOptions(), Path(folder))
        tracker.begin(TrackedRun("a", "a", "a", "cell", (), {}))
        sender = psutil.Process().children(recursive=True)
        before = sum(sum(p.cpu_times()[:2]) for p in sender)
        begun = time.perf_counter()
        while (now := time.perf_counter() - begun) < seconds:
            tracker.log({"time_s": now} | {f"lane/{lane}_busy_share": 0.5 for lane in LANES})
            time.sleep(1.0)
        spent = sum(sum(p.cpu_times()[:2]) for p in sender) - before
        resident = sum(p.memory_info().rss for p in sender)
        tracker.end(TrackedResult(ok=True, summary={}))
        tracker.close()
    return spent / seconds, resident / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    seconds = parser.parse_args().seconds
    for _ in range(3):
        report, moment = report_us()
        print(f"report of progress {report:.2f} us, moment {moment:.0f} us")
    share, resident = sender_share(seconds)
    print(f"sending process: {share:.4f} processor seconds per second, {resident:.0f} MiB resident")


if __name__ == "__main__":
    main()
