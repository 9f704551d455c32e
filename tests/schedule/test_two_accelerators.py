"""A schedule over two accelerators passes through everything behind the generator, without a name for the second
one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgen_bench.core.errors import DoesNotFit
from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.tiers import Lane, LaneKind, Site, Tier
from flexgen_bench.core.timeline import Timeline
from flexgen_bench.engine.executor import Executor, LaneSettings
from flexgen_bench.engine.throttle import Link
from flexgen_bench.planner.cost import StepTimes
from flexgen_bench.planner.forecast import forecast
from flexgen_bench.planner.lane_sums import LaneSums
from flexgen_bench.planner.memory_plan import MemoryPlan, plan_job
from flexgen_bench.planner.simulator import SharedCores, Simulator, shared_links
from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.dependencies import DependencyTracker
from flexgen_bench.schedule.micro_batch import NO_MICRO_BATCH, MicroBatch
from flexgen_bench.schedule.scheduled_job import ScheduledJob, Unit, UnitKind
from flexgen_bench.schedule.scheduler import Scheduler
from flexgen_bench.schedule.sequence_groups import Request
from flexgen_bench.schedule.steps import Step, StepKind
from flexgen_bench.store.trace import Trace, encode_trace, read_trace
from flexgen_bench.trace.chart import chart
from flexgen_bench.trace.chrome import trace_events
from flexgen_bench.trace.passes import find_passes
from flexgen_bench.trace.runs import TracedRun
from flexgen_bench.trace.summary import summarise, to_text
from tests.support.planner_machines import ACCELERATOR, EMULATED, PlannedJob, model_of, small_opt
from tests.support.record_factory import make_record

FIRST, SECOND = Site.GPU, Site(Tier.GPU, 1)
MICRO_BATCHES = 4
SECONDS = {LaneKind.GPU: 3.0, LaneKind.D2H: 1.0, LaneKind.H2D: 1.0, LaneKind.CPU: 0.5}


def pipeline() -> Iterator[Step]:
    """A pass over two layers, the second on another accelerator; hidden states are sent through host memory, and every
    accelerator has two staging buffers for them."""
    for number in range(MICRO_BATCHES):
        place = number % 2
        here, sent, there = (Buffer(name, place) for name in ("x.gpu", "x.cpu", "x.gpu:1"))
        tokens = Buffer("tokens", number)
        who = MicroBatch(number, (), place, 0, 0, 1, ())
        yield Step(FIRST.lane, StepKind.EMBED, 0, who, reads=(tokens,), writes=(here,), flops=9)
        yield Step(FIRST.d2h, StepKind.STORE_HIDDEN, 0, who, reads=(here,), writes=(sent,), bytes=1000)
        yield Step(SECOND.h2d, StepKind.LOAD_HIDDEN, 1, who, reads=(sent,), writes=(there,), bytes=1000)
        yield Step(SECOND.lane, StepKind.OUTPUT, 1, who, reads=(there,), writes=(there,), flops=9)
        yield Step(SECOND.cpu, StepKind.SAMPLE, 2, who, reads=(there,), writes=(tokens,))


def times(step: Step) -> StepTimes:
    return StepTimes(SECONDS[step.lane.kind], 0)


def test_dependencies_name_the_lane_of_the_right_device() -> None:
    tracker = DependencyTracker()
    waits = [tracker.add(step)[1] for step in pipeline()]
    embed, store, load, output, sample = waits[:5]
    assert embed == {}
    assert store == {FIRST.lane: 1}
    assert load == {FIRST.d2h: 1}
    assert output == {SECOND.h2d: 1}
    assert sample == {SECOND.lane: 1, FIRST.lane: 1}
    assert waits[10] == {FIRST.d2h: 1}, "the third micro-batch takes the buffer of the first, once it was sent"
    assert waits[12] == {FIRST.d2h: 3, SECOND.lane: 1, Lane.CPU: 1}


def test_the_simulator_fills_the_pipeline() -> None:
    simulator = Simulator(times, contention=shared_links, keep=True)
    seconds = simulator.run_pass(pipeline())
    simulator.drain()
    # Filling it takes a step on the first accelerator and two transfers; then the second one is busy to the end.
    assert seconds == pytest.approx(3 + 1 + 1 + MICRO_BATCHES * 3 + 0.5)
    assert simulator.busy_s[FIRST.lane] == simulator.busy_s[SECOND.lane] == pytest.approx(3 * MICRO_BATCHES)
    assert simulator.bytes[FIRST.d2h] == simulator.bytes[SECOND.h2d] == 1000 * MICRO_BATCHES
    assert set(simulator.busy_s) == {FIRST.lane, FIRST.d2h, SECOND.h2d, SECOND.lane, Lane.CPU}
    assert Simulator(lambda step: StepTimes(SECONDS[step.lane.kind], 0), overlap=False).run_pass(
        pipeline()
    ) == pytest.approx(MICRO_BATCHES * (3 + 1 + 1 + 3 + 0.5))


def test_the_closed_form_is_the_slowest_lane_of_either_device() -> None:
    units = (
        Unit(0, UnitKind.EMBED, Tier.GPU, 0, FIRST),
        Unit(1, UnitKind.LAYER, Tier.GPU, 0, SECOND),
        Unit(2, UnitKind.HEAD, Tier.GPU, 0, SECOND),
    )
    job = ScheduledJob(units, Tier.GPU, AttentionSite.COMPUTE, 1, 2, 1, 1, 1, 1, 1, 1)

    def of(slow: Lane) -> float:
        sums = LaneSums(lambda step: 100.0 if step.lane is slow else SECONDS[step.lane.kind], True, job)
        return sums.run_pass(pipeline())

    assert of(FIRST.lane) >= 100 * MICRO_BATCHES
    assert of(SECOND.lane) >= 100 * MICRO_BATCHES
    assert of(SECOND.h2d_weights) < 100


def test_devices_share_cores_but_no_links() -> None:
    assert shared_links([FIRST.h2d, SECOND.h2d, SECOND.h2d_weights]) == {
        FIRST.h2d: 1.0,
        SECOND.h2d: 0.5,
        SECOND.h2d_weights: 0.5,
    }
    cores = SharedCores({LaneKind.H2D: 0.2})
    assert cores([FIRST.lane, SECOND.lane, SECOND.h2d]) == {FIRST.lane: 0.4, SECOND.lane: 0.4, SECOND.h2d: 1.0}


def run(overlap: bool = True) -> tuple[list[Step], Timeline]:
    """The steps in the order they ended, and their timeline."""
    lanes = dict.fromkeys(sorted({*FIRST.lanes, *SECOND.lanes}), LaneSettings())
    executor = Executor(lanes | {SECOND.h2d: LaneSettings(link=Link(1e7))}, overlap)
    ended: list[Step] = []
    for step in pipeline():
        executor.submit(step, ended.append)
    executor.drain()
    executor.close()
    return ended, executor.timeline()


@pytest.mark.parametrize("overlap", [True, False])
def test_the_executor_keeps_the_order_of_every_micro_batch(overlap: bool) -> None:
    ended, timeline = run(overlap)
    assert set(ended) == set(pipeline())
    for lane in {step.lane for step in ended}:
        assert [s for s in ended if s.lane is lane] == [s for s in pipeline() if s.lane is lane]
        assert len(timeline.lanes[str(lane)]) == MICRO_BATCHES
    assert list(timeline.lanes["h2d"]) == list(timeline.lanes["h2d_weights:1"]) == []


def test_both_accelerators_compute_at_once() -> None:
    """Two steps that wait for each other's start can only end if their lanes are two."""
    executor, together = Executor({s.lane: LaneSettings() for s in (FIRST, SECOND)}), threading.Barrier(2, timeout=20)
    for site in (FIRST, SECOND):
        executor.submit(Step(site.lane, StepKind.OUTPUT, 1), lambda step: together.wait() and None)
    executor.drain()
    executor.close()


def test_a_trace_shows_both(tmp_path: Path) -> None:
    _, timeline = run()
    path = tmp_path / "trace.json.gz"
    path.write_bytes(encode_trace(Trace("0" * 16, Evidence.EMULATED, timeline)))
    kept = TracedRun(path, make_record(), read_trace(path).timeline)
    assert set(kept.timeline.lanes) >= {"gpu", "gpu:1", "h2d:1", "h2d_weights:1"}
    summary = summarise(kept.timeline)
    assert {lane.lane: lane.is_link for lane in summary.lanes} == {
        "gpu": False,
        "gpu:1": False,
        "d2h": True,
        "h2d:1": True,
        "cpu": False,
    }
    assert "gpu:1" in to_text(summary)
    assert "h2d:1 throttled to 0.01 GB/s" in chart(kept)
    counters = {e["name"] for e in trace_events(kept)["traceEvents"] if e["ph"] == "C"}
    assert counters == {"d2h in flight", "h2d:1 in flight"}
    assert [(found.number, found.prefills) for found in find_passes(kept.timeline)] == [(1, True)]


# What the generator makes for another device


REQUESTS = (Request(5, 4),) * 6


def passes(policy: Policy, plan: MemoryPlan) -> Iterator[Iterator[Step]]:
    scheduler = Scheduler(policy, plan)
    while not scheduler.is_done:
        yield scheduler.steps(scheduler.schedule())
        scheduler.postprocess()


def planned(job: PlannedJob, device: int) -> MemoryPlan:
    return plan_job(model_of(job.shape, job.policy.lossy), job.policy, job.hardware, job.requests, device=device)


POLICIES = [
    Policy(2, 2, Placement(0.5, 0.25, 0.25), Placement(0.5, 0.25, 0.25), Placement(0.5, 0.25, 0.25)),
    Policy(2, 2, Placement(cpu=1), Placement(cpu=1), Placement(disk=1), attention=AttentionSite.CPU),
    Policy(2, 2, Placement(0.5, 0.5), Placement(gpu=1), Placement(0.5, 0.5), offloaded=Offloaded.IN_PLACE),
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("hardware", [ACCELERATOR, EMULATED], ids=["gpu", "emulated"])
def test_a_job_on_another_accelerator_is_the_same_job(policy: Policy, hardware: HardwareProfile) -> None:
    """Every step, every byte and every second, on its lanes and in its memory."""
    job = PlannedJob(small_opt(), policy, hardware, REQUESTS)
    first, third = planned(job, 0), planned(job, 2)

    def there(name: str) -> str:
        of_accelerator = name in ("gpu", "h2d", "h2d_weights", "d2h")
        return f"{name}:2" if of_accelerator else name

    def renamed(buffer: Buffer) -> Buffer:
        return buffer._replace(name=buffer.name + ":2" if buffer.name.endswith(".gpu") else buffer.name)

    assert {there(str(site)): parts for site, parts in first.bytes.items()} == {
        str(site): parts for site, parts in third.bytes.items()
    }
    assert third.total(Tier.GPU, 2) == first.total(Tier.GPU) > 0 == third.total(Tier.GPU)
    steps = [[step for part in passes(policy, plan) for step in part] for plan in (first, third)]
    for ours, theirs in zip(*steps, strict=True):
        assert there(str(ours.lane)) == str(theirs.lane)
        assert tuple(map(renamed, ours.reads)) == theirs.reads
        assert tuple(map(renamed, ours.writes)) == theirs.writes
        kept = {"lane": Lane.CPU, "micro_batch": NO_MICRO_BATCH, "reads": (), "writes": ()}
        assert ours._replace(**kept) == theirs._replace(**kept)
    times = [forecast(plan) for plan in (first, third)]
    assert times[0].total_s == pytest.approx(times[1].total_s)
    assert {there(str(lane)): s for lane, s in times[0].busy_s().items()} == {
        str(lane): pytest.approx(s) for lane, s in times[1].busy_s().items()
    }


def test_what_does_not_fit_names_the_device() -> None:
    job = PlannedJob(small_opt(), POLICIES[0], ACCELERATOR, REQUESTS)
    with pytest.raises(DoesNotFit, match="tier gpu:1 ") as error:
        planned(job, 1).check({Tier.GPU: 10})
    assert error.value.tier == "gpu:1"
