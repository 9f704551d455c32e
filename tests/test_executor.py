"""Lanes: order, waiting, concurrency, throttled links, and failures that reach the caller and leave nothing running."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from flexgen_bench.core.tiers import Lane
from flexgen_bench.engine.executor import Executor, LaneSettings
from flexgen_bench.schedule.steps import Buffer, Step, StepKind

LANES = {lane: LaneSettings() for lane in Lane}


def step(lane: Lane, unit: int, reads: str = "", writes: str = "", size: int = 0) -> Step:
    return Step(
        lane, StepKind.LOAD_WEIGHTS, unit,
        reads=tuple(Buffer(name) for name in reads), writes=tuple(Buffer(name) for name in writes), bytes=size,
    )  # fmt: skip


def lane_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("lane-")]


@pytest.mark.parametrize("overlap", [True, False])
def test_steps_run_in_lane_order_after_what_they_wait_for(overlap: bool) -> None:
    seen: list[int] = []
    executor = Executor(LANES, overlap)
    for unit in range(50):
        executor.submit(step(Lane.DISK_READ, 2 * unit, writes="a"), lambda s: seen.append(s.unit))
        executor.submit(
            step(Lane.CPU, 2 * unit + 1, reads="a", writes="b"), lambda s: seen.append(s.unit)
        )
    executor.drain()
    executor.close()
    assert seen == list(range(100)), (
        "each read waits for its write, each write for the read before it"
    )
    assert not lane_threads()


def test_independent_lanes_run_at_the_same_time() -> None:
    """Two steps that wait for each other's start can only end if both lanes work at once."""
    barrier = threading.Barrier(2, timeout=20)
    executor = Executor(LANES)
    executor.submit(step(Lane.DISK_READ, 0, writes="a"), lambda s: barrier.wait() and None)
    executor.submit(step(Lane.CPU, 1, writes="b"), lambda s: barrier.wait() and None)
    executor.drain()
    executor.close()


def _fail(error: BaseException) -> Callable[[Step], None]:
    def action(s: Step) -> None:
        raise error

    return action


@pytest.mark.parametrize("overlap", [True, False])
def test_a_failure_reaches_the_caller_and_stops_what_depends_on_it(overlap: bool) -> None:
    ran: list[int] = []
    executor = Executor(LANES, overlap)

    def work() -> None:
        executor.submit(step(Lane.DISK_READ, 0, writes="a"), _fail(OSError("disk on fire")))
        for unit in range(1, 20):
            executor.submit(step(Lane.CPU, unit, reads="a"), lambda s: ran.append(s.unit))
        executor.drain()

    with pytest.raises(OSError, match="disk on fire"):
        work()
    executor.abort()
    executor.close()
    assert ran == []
    assert not lane_threads()


def test_abort_ends_lanes_that_wait() -> None:
    started, release = threading.Event(), threading.Event()
    executor = Executor(LANES)

    def slow(s: Step) -> None:
        started.set()
        release.wait(20)

    ran: list[int] = []
    executor.submit(step(Lane.DISK_READ, 0, writes="a"), slow)
    executor.submit(step(Lane.CPU, 1, reads="a"), lambda s: ran.append(1))
    assert started.wait(20)
    release.set()
    executor.abort()
    executor.close()
    assert not lane_threads()


def test_use_counts_steps_and_bytes() -> None:
    executor = Executor(LANES)
    for unit in range(5):
        executor.submit(step(Lane.H2D, unit, writes="a", size=100), lambda s: None)
    executor.drain()
    use = executor.use()
    executor.close()
    assert (use[Lane.H2D].steps, use[Lane.H2D].bytes) == (5, 500)
    assert use[Lane.CPU].steps == 0


def test_a_throttled_link_takes_at_least_bytes_over_bandwidth() -> None:
    executor = Executor({**LANES, Lane.H2D: LaneSettings(bytes_per_s=1e6)})
    for unit in range(4):
        executor.submit(step(Lane.H2D, unit, writes="a", size=10_000), lambda s: None)
    executor.drain()
    busy = executor.use()[Lane.H2D].busy_s
    executor.close()
    assert busy >= 4 * 10_000 / 1e6
