"""Lanes: order, waiting, concurrency, throttled links, and failures that reach the caller and leave nothing running."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_bench.core.errors import OutOfMemory
from flexgen_bench.core.status import Status
from flexgen_bench.core.tiers import Lane, Site
from flexgen_bench.engine import timeline
from flexgen_bench.engine.executor import Executor, LaneSettings
from flexgen_bench.engine.progress import Aborted, Failure, Progress
from flexgen_bench.engine.throttle import Link, Throttle, Transfer
from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.steps import Step, StepKind

LANES = {lane: LaneSettings() for lane in Site.GPU.lanes}


def step(lane: Lane, unit: int, reads: str = "", writes: str = "", size: int = 0) -> Step:
    return Step(
        lane,
        StepKind.LOAD_WEIGHTS,
        unit,
        reads=tuple(Buffer(name) for name in reads),
        writes=tuple(Buffer(name) for name in writes),
        bytes=size,
    )


def lane_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("lane-")]


@pytest.mark.parametrize("overlap", [True, False])
def test_steps_run_in_lane_order_after_what_they_wait_for(overlap: bool) -> None:
    seen: list[int] = []
    executor = Executor(LANES, overlap)
    for unit in range(50):
        executor.submit(step(Lane.DISK_READ, 2 * unit, writes="a"), lambda s: seen.append(s.unit))
        executor.submit(step(Lane.CPU, 2 * unit + 1, reads="a", writes="b"), lambda s: seen.append(s.unit))
    executor.drain()
    executor.close()
    assert seen == list(range(100)), "each read waits for its write, each write for the read before it"
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
    executor = Executor({**LANES, Lane.H2D: LaneSettings(link=Link(1e6))})
    start = time.perf_counter()
    for unit in range(4):
        executor.submit(step(Lane.H2D, unit, writes="a", size=10_000), lambda s: None)
    executor.drain()
    wall = time.perf_counter() - start
    busy = executor.use()[Lane.H2D].busy_s
    executor.close()
    assert wall >= busy >= 4 * 10_000 / 1e6 - 1e-9


class _LateClock:
    """A clock on which every sleep ends 1 s late."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("flexgen_bench.engine.throttle.time", self)

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + 1.0


def test_sleeps_that_end_late_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every transfer of a busy link once began when the sleep of the one before had ended: 200 us took 300."""
    clock = _LateClock(monkeypatch)
    link = Throttle(Link(bytes_per_s=1.0))
    held = [link.hold(link.begin(10, was_waiting=True)) for _ in range(50)]
    assert held == [(10.0 * i, 10.0 * (i + 1)) for i in range(50)]
    assert clock.now == 50 * 10 + 1


def test_a_link_that_was_idle_has_nothing_to_catch_up_with(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _LateClock(monkeypatch)
    link = Throttle(Link(bytes_per_s=1.0))
    assert link.hold(link.begin(10, was_waiting=False)) == (0.0, 10.0)
    clock.now = 100.0
    assert link.hold(link.begin(10, was_waiting=False)) == (100.0, 110.0)
    copied = link.begin(10, was_waiting=True)
    clock.now = 150.0  # a copy that took longer than the link would have
    assert link.hold(copied) == (110.0, 150.0)
    assert link.hold(link.begin(10, was_waiting=True)) == (150.0, 160.0)
    assert clock.now == 161.0


def test_lanes_on_one_link_have_equal_parts_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small transfer beside a large one takes twice as long as alone, and not until the large one is over."""
    clock = _LateClock(monkeypatch)
    link = Link(bytes_per_s=1.0)
    weights, others = Throttle(link), Throttle(link)
    large = weights.begin(1000, was_waiting=False)
    clock.now = 500.0
    assert others.hold(others.begin(10, was_waiting=False)) == (500.0, 520.0)
    small = others.begin(10, was_waiting=True)
    assert others.hold(small) == (520.0, 540.0), "late sleeps do not add up here either"
    assert weights.hold(large) == (0.0, 1020.0)
    # Alone again, each has all of it.
    clock.now = 2000.0
    assert others.hold(others.begin(10, was_waiting=False)) == (2000.0, 2010.0)
    assert weights.hold(weights.begin(10, was_waiting=False)) == (2011.0, 2021.0)


def test_what_was_waiting_does_not_take_back_what_the_other_lane_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun late, a transfer is on the link from when its lane was free, but the time that the link spent on others is
    gone."""
    clock = _LateClock(monkeypatch)
    link = Link(bytes_per_s=1.0)
    weights, others = Throttle(link), Throttle(link)
    assert others.hold(others.begin(10, was_waiting=False)) == (0.0, 10.0)
    clock.now = 20.0
    assert weights.hold(weights.begin(10, was_waiting=False)) == (20.0, 30.0)
    assert others.hold(others.begin(10, was_waiting=True)) == (30.0, 40.0)


@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.floats(0, 300), st.booleans(), st.integers(0, 2)), min_size=1, max_size=30
    )
)
@settings(max_examples=200, deadline=None)
def test_a_shared_link_never_moves_more_than_its_bandwidth(asked: list[tuple[int, float, bool, int]]) -> None:
    """(bytes, begun after the one before, by so much in the past, on which lane): every span of time has room for all
    that began and ended in it, and the link is never idle while something is on it."""
    link, lanes, now = Link(bytes_per_s=2.0), [0.0] * 3, 0.0
    done: list[tuple[float, float, int]] = []
    running: dict[int, tuple[Transfer, int]] = {}
    with pytest.MonkeyPatch.context() as patch:
        clock = _LateClock(patch)
        for count, after, back, lane in asked:
            if lane in running:
                transfer, moved = running.pop(lane)
                lanes[lane] = link.finish(transfer)
                done.append((transfer.begin_s, lanes[lane], moved))
            now = clock.now = clock.now + after
            running[lane] = (link.begin(count, lanes[lane] if back else now), count)
        done += [(t.begin_s, link.finish(t), moved) for t, moved in running.values()]
    for begin, _, _ in done:
        for _, end, _ in done:
            inside = sum(n for b, e, n in done if begin <= b and e <= end)
            assert inside <= 2.0 * max(0.0, end - begin) + 1e-6
    assert all(e - b <= sum(n for *_, n in done) / 2.0 + 1e-6 for b, e, _ in done)


def test_threads_that_share_a_link_both_get_on_and_stay_below_its_bandwidth() -> None:
    link = Link(bytes_per_s=1e6)
    lanes = {**LANES, Lane.H2D: LaneSettings(link=link), Lane.H2D_WEIGHTS: LaneSettings(link=link)}
    executor = Executor(lanes)
    start = time.perf_counter()
    executor.submit(step(Lane.H2D_WEIGHTS, 0, writes="a", size=300_000), lambda s: None)
    for unit in range(20):
        executor.submit(step(Lane.H2D, unit, writes="b", size=1_000), lambda s: None)
    executor.drain()
    wall = time.perf_counter() - start
    [large] = executor.timeline().lanes["h2d_weights"]
    small = list(executor.timeline().lanes["h2d"])
    executor.close()
    assert wall >= 320_000 / 1e6
    assert small[-1].end_s < large.end_s, "none waits for the whole of the large one"
    assert large.seconds >= 300_000 / 1e6
    assert sum(s.seconds for s in small) >= 20_000 / 1e6


def test_the_timeline_holds_every_step_of_every_lane() -> None:
    executor = Executor({**LANES, Lane.H2D: LaneSettings(link=Link(1e9))})
    for unit in range(5):
        executor.submit(step(Lane.H2D, unit, writes="a", size=100), lambda s: None)
        executor.submit(step(Lane.CPU, unit, reads="a", writes="b"), lambda s: None)
    executor.drain()
    lanes, use = executor.timeline().lanes, executor.use()
    executor.close()
    assert set(lanes) == {str(lane) for lane in Site.GPU.lanes}
    assert lanes["h2d"].bytes_per_s == 1e9
    assert lanes["gpu"].bytes_per_s is None
    for lane, did in use.items():
        slices = list(lanes[lane.name])
        assert len(lanes[lane.name]) == len(slices) == did.steps
        assert [s.unit for s in slices] == list(range(did.steps))
        assert sum(s.bytes for s in slices) == did.bytes
        assert sum(s.seconds for s in slices) == pytest.approx(did.busy_s)
        ends = [0.0, *(s.end_s for s in slices)]
        assert all(s.begin_s >= end for s, end in zip(slices, ends, strict=False))
    assert {s.kind for s in lanes["h2d"]} == {"load_weights"}
    loads, reads = list(lanes["h2d"]), list(lanes["cpu"])
    assert all(r.end_s >= w.end_s for w, r in zip(loads, reads, strict=True))


def test_a_long_job_keeps_its_beginning_and_counts_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline.StepBudget.__init__, "__defaults__", (7,))
    executor = Executor(LANES, overlap=False)
    for unit in range(10):
        executor.submit(step(Lane.CPU, unit), lambda s: None)
    executor.drain()
    found = executor.timeline()
    executor.close()
    assert [s.unit for s in found.lanes["cpu"]] == list(range(7))
    assert found.dropped == found.lanes["cpu"].dropped == 3
    assert executor.use()[Lane.CPU].steps == 10


@pytest.mark.parametrize(
    ("error", "tier"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), "gpu"),
        (MemoryError("cannot allocate 4096 bytes of host memory"), "cpu"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "cpu"),
    ],
)
def test_memory_that_runs_out_in_a_step_says_where_and_what_to_do(error: BaseException, tier: str) -> None:
    executor = Executor(LANES)
    executor.submit(step(Lane.H2D, 7, writes="a"), _fail(error))
    with pytest.raises(OutOfMemory, match="another process may have taken the memory") as caught:
        executor.drain()
    executor.close()
    message = str(caught.value)
    assert f"out of memory on tier {tier} in step load_weights of unit 7 (lane h2d)" in message
    assert str(error).splitlines()[0].rstrip(".") in message
    assert "\n" not in message
    assert caught.value.status is Status.OOM
    assert caught.value.__cause__ is error


def test_any_other_error_tells_which_step_it_was() -> None:
    executor = Executor(LANES)
    doing = Step(Lane.CPU, StepKind.ATTEND, 3, part=1)
    executor.submit(doing, _fail(ValueError("odd")))
    with pytest.raises(ValueError, match="odd") as caught:
        executor.drain()
    executor.close()
    assert caught.value.__notes__ == ["in step attend of unit 3 (lane cpu, part 1)"]


def test_only_who_waits_for_what_is_done_is_woken() -> None:
    progress, woken = Progress(Failure()), []

    def waiter(number: int) -> None:
        progress.wait(number)
        woken.append(number)

    threads = [threading.Thread(target=waiter, args=(n,)) for n in (2, 4)]
    for thread in threads:
        thread.start()
    for number in (1, 2):
        progress.reach(number)
    threads[0].join(20)
    assert woken == [2]
    for number in (3, 4):
        progress.reach(number)
    threads[1].join(20)
    assert woken == [2, 4]
    assert not progress.wait(4), "what is done needs no waiting"


def test_a_failure_wakes_who_waits_for_a_step_that_will_not_come() -> None:
    failure = Failure()
    progress, raised = Progress(failure), threading.Event()

    def waiter() -> None:
        try:
            progress.wait(1)
        except Aborted:
            raised.set()

    thread = threading.Thread(target=waiter)
    thread.start()
    failure.set(OSError("first"))
    failure.set(OSError("second"))
    progress.wake_all()
    thread.join(20)
    assert raised.is_set()
    assert str(failure.error) == "first"


def test_many_lanes_under_contention_lose_no_wakeup() -> None:
    """Chains across all lanes, driven from outside with waits in between: a lost wakeup would hang here."""
    executor = Executor(LANES)
    lanes = list(Site.GPU.lanes)
    for unit in range(2000):
        ticket = executor.submit(step(lanes[unit % len(lanes)], unit, reads="a", writes="a"), lambda s: None)
        if unit % 7 == 0:
            executor.wait([ticket])
    executor.drain()
    assert sum(use.steps for use in executor.use().values()) == 2000
    executor.close()
