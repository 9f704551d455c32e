"""Stream lanes: order across streams, times of the device on the host's clock, errors of the device.

Without a GPU, a stand-in for CUDA's events that completes everything at once checks the bookkeeping; the tests marked
``gpu`` check the real thing.
"""

from __future__ import annotations

import contextlib
import struct
import time
from itertools import pairwise
from typing import Any

import pytest
import torch

from flexgen_bench.core.tiers import Lane
from flexgen_bench.engine.executor import Executor, LaneSettings
from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.steps import Step, StepKind


class FakeDevice:
    """A device with a clock of its own, in seconds; work is over as soon as it is issued."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 5e5  # it has been on for days
        self.broken = False
        self.waits: list[tuple[FakeStream, FakeEvent]] = []
        self.made = 0
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: self.event())
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def work(self, seconds: float) -> None:
        self.now += seconds

    def event(self) -> FakeEvent:
        self.made += 1
        return FakeEvent(self)


class FakeStream:
    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def wait_event(self, event: FakeEvent) -> None:
        self.device.waits.append((self, event))

    def synchronize(self) -> None:
        if self.device.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self.device = device

    def record(self, stream: FakeStream) -> None:
        self.at = self.device.now

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """It is over already."""

    def elapsed_time(self, later: FakeEvent) -> float:
        """Milliseconds, rounded to 32 bits as CUDA does."""
        milliseconds: float = struct.unpack("f", struct.pack("f", (later.at - self.at) * 1000))[0]
        return milliseconds


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return FakeDevice(monkeypatch)


def stream_lanes(device: FakeDevice) -> dict[Lane, Any]:
    lanes = {Lane.H2D: FakeStream(device), Lane.GPU: FakeStream(device)}
    settings = {lane: LaneSettings(stream=stream) for lane, stream in lanes.items()}  # type: ignore[arg-type]
    return {**settings, Lane.CPU: LaneSettings()}


def test_times_of_a_long_job_stay_exact(device: FakeDevice) -> None:
    """Milliseconds since the start, in 32 bits, are half a millisecond coarse after an hour."""
    executor = Executor(stream_lanes(device), overlap=False)
    for unit in range(200):
        device.now += 60.0  # somebody else's work
        executor.submit(Step(Lane.GPU, StepKind.PROJECT, unit, bytes=3), lambda s: device.work(1e-3))
        executor.collect()
    executor.drain()
    use, slices = executor.use()[Lane.GPU], list(executor.timeline().lanes["gpu"])
    executor.close()
    assert (use.steps, use.bytes, len(slices)) == (200, 600, 200)
    assert all(s.seconds == pytest.approx(1e-3, abs=1e-6) for s in slices)
    # Minutes apart, a gap is as coarse as 32 bits are for a minute.
    assert all(b.begin_s - a.end_s == pytest.approx(60.0, abs=1e-4) for a, b in pairwise(slices))


def test_streams_wait_for_each_other_on_the_device(device: FakeDevice) -> None:
    lanes = stream_lanes(device)
    executor = Executor(lanes)
    staged, made = Buffer("weights"), Buffer("x")
    executor.submit(Step(Lane.H2D, StepKind.LOAD_WEIGHTS, 1, writes=(staged,)), lambda s: None)
    executor.submit(Step(Lane.GPU, StepKind.PROJECT, 1, reads=(staged,), writes=(made,)), lambda s: None)
    executor.submit(Step(Lane.CPU, StepKind.SAMPLE, 1, reads=(made,)), lambda s: None)
    executor.drain()
    executor.close()
    assert [stream for stream, _ in device.waits] == [lanes[Lane.GPU].stream]


def test_events_are_used_again(device: FakeDevice) -> None:
    """Making two for every step took longer than recording them. Collected ones come back, but for the one that times
    count from: the clock's origin moves on every 8 seconds."""
    executor = Executor(stream_lanes(device), overlap=False)
    for unit in range(50):
        device.now += 1.0
        executor.submit(Step(Lane.GPU, StepKind.PROJECT, unit), lambda s: device.work(1e-3 * (s.unit + 1)))
        executor.collect()
    executor.drain()
    slices = list(executor.timeline().lanes["gpu"])
    executor.close()
    assert [s.seconds for s in slices] == pytest.approx([1e-3 * (n + 1) for n in range(50)], abs=1e-6)
    assert device.made <= 1 + 2 * (1 + 50 // 8 + 1)


def test_an_error_of_the_device_surfaces_when_lanes_end(device: FakeDevice) -> None:
    executor = Executor(stream_lanes(device))
    device.broken = True
    with pytest.raises(RuntimeError, match="illegal memory access"):
        executor.close()


def test_an_error_of_a_step_is_told_rather_than_what_follows_from_it(device: FakeDevice) -> None:
    executor = Executor(stream_lanes(device))

    def fail(step: Step) -> None:
        device.broken = True
        raise ValueError("the first error")

    executor.submit(Step(Lane.GPU, StepKind.PROJECT, 4), fail)
    with pytest.raises(ValueError, match="the first error") as caught:
        executor.drain()
    executor.abort()
    assert caught.value.__notes__[0] == "in step project of unit 4 (lane gpu)"
    assert any("lane gpu ended with: CUDA error" in note for note in caught.value.__notes__)


@pytest.mark.gpu
def test_real_streams_run_in_order_and_on_the_hosts_clock() -> None:
    """Loads and products alternate over two slots; a slot is never read before its load nor written while in use."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    lanes = {
        Lane.H2D: LaneSettings(stream=torch.cuda.Stream()),
        Lane.GPU: LaneSettings(stream=torch.cuda.Stream()),
        Lane.CPU: LaneSettings(),
    }
    slots = [torch.zeros(1 << 20, device="cuda") for _ in range(2)]
    host = [torch.full((1 << 20,), float(i)).pin_memory() for i in range(20)]
    sums: list[torch.Tensor] = []
    torch.cuda.synchronize()

    def load(step: Step) -> None:
        torch.cuda._sleep(1_000_000)
        slots[step.weight_buffer].copy_(host[step.unit], non_blocking=True)

    executor = Executor(lanes)
    start = time.perf_counter()
    for unit in range(20):
        slot, total = Buffer("slot", unit % 2), Buffer("sum")
        executor.submit(Step(Lane.H2D, StepKind.LOAD_WEIGHTS, unit, weight_buffer=unit % 2, writes=(slot,)), load)
        executor.submit(
            Step(Lane.GPU, StepKind.PROJECT, unit, weight_buffer=unit % 2, reads=(slot,), writes=(total,)),
            lambda s: sums.append(slots[s.weight_buffer].sum()),
        )
    executor.submit(Step(Lane.CPU, StepKind.SAMPLE, 20, reads=(total,)), lambda s: None)
    executor.drain()
    wall = time.perf_counter() - start
    found = {name: list(lane) for name, lane in executor.timeline().lanes.items()}
    executor.close()
    assert [total.item() / (1 << 20) for total in sums] == [float(i) for i in range(20)]
    for unit, (loaded, used) in enumerate(zip(found["h2d"], found["gpu"], strict=True)):
        assert loaded.unit == used.unit == unit
        assert used.begin_s >= loaded.end_s - 1e-5
    for lane in found.values():
        assert all(b.begin_s >= a.end_s - 1e-5 for a, b in pairwise(lane))
    [sampled] = found["cpu"]
    assert sampled.begin_s >= found["gpu"][-1].end_s - 1e-3, "one clock for host and device"
    assert sampled.end_s <= wall + 1.0
