"""The simulator: held against a second one that is as slow and plain as can be, and against what must be true of
any."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.rates import SiteRates
from flexgen_bench.core.tiers import Lane, LaneKind, Site
from flexgen_bench.planner.cost import StepCost, StepTimes
from flexgen_bench.planner.forecast import contention
from flexgen_bench.planner.simulated_lanes import Contention
from flexgen_bench.planner.simulator import SharedCores, Simulator
from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.dependencies import DependencyTracker
from flexgen_bench.schedule.steps import Step, StepKind
from tests.support.planner_machines import EMULATED, HOST, PlannedJob, jobs

EXACTLY = 1e-9  # of floats against fractions


@dataclass
class Played:
    """Of every step when it began and ended, in program order, and when each pass was over."""

    begins: list[Fraction]
    ends: list[Fraction]
    passes: list[Fraction]


def waits_for(steps: Sequence[Step], overlap: bool) -> list[list[int]]:
    """For each step the earlier ones it must wait for: read off all pairs."""
    reads = [frozenset(step.reads) for step in steps]
    writes = [frozenset(step.writes) for step in steps]
    return [
        [
            m
            for m in range(n)
            if steps[m].lane is step.lane
            or not overlap
            or not writes[m].isdisjoint(step.reads + step.writes)
            or not reads[m].isdisjoint(writes[n])
        ]
        for n, step in enumerate(steps)
    ]


def brute_force(
    passes: Sequence[Sequence[Step]], times: Callable[[Step], StepTimes], overlap: bool, speeds: Contention | None
) -> Played:
    """The same lanes in exact numbers, everything looked at again at every event. A step of a stream is issued once it
    is handed over (with its pass, or when the one before has ended), the one before it on its lane is issued, and what
    it waits for is issued on a stream, or over on the host."""
    steps = [step for one in passes for step in one]
    of_pass = [number for number, one in enumerate(passes) for _ in one]
    waits = waits_for(steps, overlap)
    now = Fraction(0)
    begins: dict[int, Fraction] = {}
    ends: dict[int, Fraction] = {}
    left: dict[int, Fraction] = {}
    issued: dict[int, Fraction] = {}
    over: list[Fraction] = []

    def let_passes_begin() -> None:
        while len(over) < len(passes) and all(
            n in ends for n, step in enumerate(steps) if of_pass[n] == len(over) and (step.lane.computes or not overlap)
        ):
            over.append(now)

    while len(ends) < len(steps):
        let_passes_begin()
        for n, step in enumerate(steps):
            if n not in begins and of_pass[n] <= len(over) and all(m in ends for m in waits[n]):
                taken = times(step)
                begins[n], left[n] = now, Fraction(taken.lane_s)
                given = over[of_pass[n] - 1] if of_pass[n] else Fraction(0)
                if not overlap and n:
                    given = max(given, ends[n - 1])
                before = [issued[m] if steps[m].lane.of_accelerator else ends[m] for m in waits[n]]
                issued[n] = max(given, *before, Fraction(0)) + Fraction(taken.issue_s)
                if step.lane.of_accelerator:
                    left[n] = max(left[n], issued[n] - now)
        running = {steps[n].lane: n for n in left}
        assert len(running) == len(left), "two steps on a lane"
        speed = dict.fromkeys(running, Fraction(1))
        if speeds is not None:
            speed = {lane: Fraction(s) for lane, s in speeds(list(running)).items()}
        passed = min(left[n] / speed[lane] for lane, n in running.items())
        now += passed
        for lane, n in running.items():
            left[n] -= passed * speed[lane]
            if left[n] == 0:
                ends[n] = now
                del left[n]
    let_passes_begin()
    return Played([begins[n] for n in range(len(steps))], [ends[n] for n in range(len(steps))], over)


def assert_same(
    passes: Sequence[Sequence[Step]], times_of: Callable[[Step], StepTimes], overlap: bool, speeds: Contention | None
) -> Simulator:
    simulator = Simulator(times_of, overlap, speeds, keep=True)
    clock = []
    for steps in passes:
        simulator.run_pass(steps)
        clock.append(simulator.now_s)
    simulator.drain()
    exact = brute_force(passes, times_of, overlap, speeds)
    steps = [step for one in passes for step in one]
    times = {id(e.step): e for e in simulator.events}
    assert len(times) == len(steps) == simulator.steps
    scale = float(max(exact.ends, default=Fraction(0))) or 1.0
    near = EXACTLY * scale
    assert clock == pytest.approx([float(t) for t in exact.passes], abs=near)
    assert [times[id(s)].begin_s for s in steps] == pytest.approx([float(t) for t in exact.begins], abs=near)
    assert [times[id(s)].end_s for s in steps] == pytest.approx([float(t) for t in exact.ends], abs=near)
    return simulator


class SharedLink:
    """The lanes given work at half speed while both do."""

    def __init__(self, *lanes: Lane) -> None:
        self._lanes = lanes

    def __call__(self, active: Iterable[Lane]) -> Mapping[Lane, float]:
        together = set(active)
        both = together >= set(self._lanes)
        return {lane: 0.5 if both and lane in self._lanes else 1.0 for lane in together}


@st.composite
def graphs(draw: st.DrawFn) -> list[list[Step]]:
    """Steps that read and write a few buffers, on any lanes, cut into passes. unit: what it takes, in seconds; flops:
    what issuing it takes."""
    lanes = st.sampled_from(Site.GPU.lanes)
    buffers = st.lists(st.integers(0, 4), max_size=2).map(
        lambda keys: tuple(Buffer("b", key) for key in dict.fromkeys(keys))
    )
    step = st.builds(
        lambda lane, takes, issue, reads, writes: Step(
            lane, StepKind.PROJECT, takes, reads=reads, writes=writes, flops=issue
        ),
        lanes,
        st.integers(0, 5),
        st.integers(0, 3),
        buffers,
        buffers,
    )
    return draw(st.lists(st.lists(step, max_size=10), min_size=1, max_size=4))


@given(
    graphs(),
    st.booleans(),
    st.sampled_from(
        [
            None,
            SharedLink(Lane.H2D, Lane.D2H),
            SharedLink(Lane.DISK_READ, Lane.H2D),
            SharedCores({LaneKind.H2D: 0.25, LaneKind.D2H: 0.25}),
            SharedCores({LaneKind.H2D: 0.5, LaneKind.D2H: 0.5}),
        ]
    ),
)
@settings(max_examples=150, deadline=None)
def test_any_graph_of_steps_takes_as_long_as_brute_force_says(
    passes: list[list[Step]], overlap: bool, speeds: Contention | None
) -> None:
    def times(step: Step) -> StepTimes:
        return StepTimes(float(step.unit), float(step.flops) if step.lane.of_accelerator else 0.0)

    assert_same(passes, times, overlap, speeds)


@given(jobs(most_sequences=4, longest=3))
@settings(max_examples=15, deadline=None)
def test_real_jobs_take_as_long_as_brute_force_says(job: PlannedJob) -> None:
    plan = job.plan
    passes = list(job.passes(plan))
    assert_same(passes, StepCost(plan).times, job.policy.overlap, contention(job.hardware))


@given(jobs())
@settings(max_examples=60, deadline=None)
def test_lanes_keep_their_order_and_steps_wait(job: PlannedJob) -> None:
    """Of every job: nothing is lost, nothing overtakes on its lane, no two steps of a lane at once, nothing before what
    it needs."""
    plan = job.plan
    passes = list(job.passes(plan))
    steps = [step for one in passes for step in one]
    cost = StepCost(plan)
    simulator = Simulator(cost.times, job.policy.overlap, contention(job.hardware), keep=True)
    times = [simulator.run_pass(one) for one in passes]
    total = simulator.now_s
    simulator.drain()
    assert len(simulator.events) == simulator.steps == len(steps)
    assert sum(times) == pytest.approx(total)
    near = EXACTLY * max(total, simulator.now_s)
    for lane in Site.GPU.lanes:
        events = [e for e in simulator.events if e.step.lane is lane]
        assert [id(e.step) for e in events] == [id(s) for s in steps if s.lane is lane]
        for before, after in pairwise(events):
            assert before.begin_s <= before.end_s <= after.begin_s + near
        assert simulator.busy_s[lane] == pytest.approx(sum(e.end_s - e.begin_s for e in events))
        assert simulator.busy_s[lane] <= simulator.now_s + near
        assert simulator.bytes[lane] == sum(s.bytes for s in steps if s.lane is lane)
        least = sum(cost.times(s).lane_s for s in steps if s.lane is lane)
        assert simulator.busy_s[lane] >= least - near
    event = {id(e.step): e for e in simulator.events}
    tracker = DependencyTracker()
    on_lane: dict[Lane, list[Step]] = {lane: [] for lane in Site.GPU.lanes}
    for step in steps:
        _, waits = tracker.add(step)
        on_lane[step.lane].append(step)
        for lane, number in waits.items():
            needed = event[id(on_lane[lane][number - 1])]
            assert needed.end_s <= event[id(step)].begin_s + near


@given(jobs())
@settings(max_examples=40, deadline=None)
def test_overlap_never_costs_anything(job: PlannedJob) -> None:
    together = replace(job, policy=replace(job.policy, overlap=True)).forecast()
    apart = replace(job, policy=replace(job.policy, overlap=False)).forecast()
    assert together.total_s <= apart.total_s * (1 + EXACTLY)
    plan = job.plan
    cost = StepCost(plan)
    alone = sum(cost.seconds(step) for steps in job.passes(plan) for step in steps)
    assert apart.total_s == pytest.approx(alone)


def slower(hardware: HardwareProfile, name: str) -> HardwareProfile:
    """The machine with one of its constants at half, or steps that take twice as long."""
    if name in hardware.links:
        return replace(hardware, links={**hardware.links, name: hardware.links[name] / 2})
    rates = hardware.rates
    assert rates is not None
    tier, constant = name.split()

    def halved(table: object) -> object:
        if isinstance(table, Mapping):
            return {key: halved(value) for key, value in table.items()}
        assert isinstance(table, float)
        return table * 2 if constant == "step" else table / 2

    sites = {
        t: replace(s, **{constant: halved(getattr(s, constant))}) if t == tier else s  # type: ignore[arg-type]
        for t, s in rates.sites.items()
    }
    # Measured rates may be anything; stated ones are checked against each other.
    return replace(hardware, rates=replace(rates, sites=sites, spread={"all": 0.1}))


def constants(hardware: HardwareProfile) -> list[str]:
    assert hardware.rates is not None
    return [*hardware.links, *(f"{t} {f.name}" for t in hardware.rates.sites for f in fields(SiteRates))]


# Lanes in order with fixed dependencies: the time of every step is a sum or a maximum of earlier ones, so nothing gets
# faster. Where lanes take from each other that no longer follows: what is late may miss a neighbour that would have
# slowed it.
ANOMALY = 0.03


@given(jobs(), st.data())
@settings(max_examples=80, deadline=None)
def test_a_slower_machine_is_never_faster(job: PlannedJob, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(constants(job.hardware)))
    before = job.forecast().total_s
    after = replace(job, hardware=slower(job.hardware, name)).forecast().total_s
    allowed = EXACTLY if contention(job.hardware) is None else ANOMALY
    assert after >= before * (1 - allowed)


def test_lanes_of_an_emulated_machine_share_its_cores() -> None:
    """Two compute lanes at half speed each; a link that copies a quarter's worth leaves three quarters to one of
    them."""
    cores = contention(EMULATED)
    assert cores is not None
    assert cores([Lane.GPU, Lane.CPU]) == {Lane.GPU: 0.5, Lane.CPU: 0.5}
    assert cores([Lane.GPU, Lane.H2D]) == {Lane.GPU: 0.75, Lane.H2D: 1.0}
    assert cores([Lane.CPU, Lane.GPU, Lane.D2H, Lane.H2D]) == {
        Lane.CPU: 0.25,
        Lane.GPU: 0.25,
        Lane.D2H: 1.0,
        Lane.H2D: 1.0,
    }
    assert contention(HOST) is None
    apart = (
        Step(Lane.GPU, StepKind.PROJECT, 6),
        Step(Lane.CPU, StepKind.ATTEND, 2),
        Step(Lane.H2D, StepKind.LOAD_KV, 2),
    )
    simulator = Simulator(lambda step: StepTimes(step.unit, 0), contention=cores, keep=True)
    # Till 2 the link copies and the lanes go at 3/8 each; till 4.5 at 1/2; then the longer one has 4 left for itself.
    assert simulator.run_pass(apart) == pytest.approx(8.5)
    ends = {event.step.lane: event.end_s for event in simulator.events}
    assert ends == pytest.approx({Lane.H2D: 2, Lane.CPU: 4.5, Lane.GPU: 8.5})


def test_a_pass_is_over_when_the_host_has_its_tokens() -> None:
    """A write that nobody waits for goes on beside the next pass; what it holds is not overwritten."""
    page = Buffer("page")
    simulator = Simulator(lambda step: StepTimes(step.unit, 0), keep=True)
    write = Step(Lane.DISK_WRITE, StepKind.STORE_KV, 10, reads=(page,))
    assert simulator.run_pass([Step(Lane.CPU, StepKind.ATTEND, 1, writes=(page,)), write]) == 1
    assert simulator.run_pass([Step(Lane.CPU, StepKind.ATTEND, 2)]) == 2
    assert simulator.run_pass([Step(Lane.CPU, StepKind.ATTEND, 3, writes=(page,))]) == 11
    assert simulator.events[2].begin_s == 1
    assert simulator.events[3].begin_s == 11


def test_a_stream_runs_behind_what_is_issued_ahead() -> None:
    """Issuing a step takes 2 s. While the device works at a long one two short ones are issued behind it and take their
    own time; after it, each takes as long as it is issued. In the next pass the device waits for the first of them, as
    the host had to see what the last one made."""
    on_gpu = [Step(Lane.GPU, StepKind.LAYER, takes) for takes in (6, 1, 1, 1)]
    simulator = Simulator(lambda step: StepTimes(step.unit, 2), keep=True)
    assert simulator.run_pass(on_gpu) == 9
    assert [event.end_s for event in simulator.events] == [6, 7, 8, 9]
    short = [Step(Lane.GPU, StepKind.LAYER, 1) for _ in range(3)]
    assert simulator.run_pass(short) == 6
    assert simulator.busy_s[Lane.GPU] == 15


def test_a_step_is_not_issued_before_the_host_has_what_it_needs() -> None:
    """The cpu attends for 3 s. What brings its result up is issued then, and the output behind it while it is moved."""
    host, up = Buffer("attn_host"), Buffer("attn")
    steps = [
        Step(Lane.CPU, StepKind.ATTEND, 3, writes=(host,)),
        Step(Lane.H2D, StepKind.MOVE_ATTENTION, 4, reads=(host,), writes=(up,)),
        Step(Lane.GPU, StepKind.OUTPUT, 1, reads=(up,)),
    ]
    simulator = Simulator(lambda step: StepTimes(step.unit, 2.0 * step.lane.of_accelerator), keep=True)
    assert simulator.run_pass(steps) == 8
    assert [event.end_s for event in simulator.events] == [3, 7, 8]


def test_a_busy_accelerator_hides_the_loads_of_weights() -> None:
    """Two layers of 1 s of computing each and loads of half a second, with two slots: only the first load is waited
    for."""
    slots = [Buffer("slot", n) for n in range(2)]

    def layer(number: int) -> list[Step]:
        slot = slots[number % 2]
        return [
            Step(Lane.DISK_READ, StepKind.LOAD_WEIGHTS, 1, weight_buffer=number % 2, writes=(slot,)),
            Step(Lane.CPU, StepKind.OUTPUT, 2, weight_buffer=number % 2, reads=(slot,)),
        ]

    steps = [step for number in range(6) for step in layer(number)]
    half_seconds = {True: 6 * 2 + 1, False: 6 * 3}
    for overlap, expected in half_seconds.items():
        simulator = Simulator(lambda step: StepTimes(step.unit / 2, 0), overlap)
        assert simulator.run_pass(steps) == pytest.approx(expected / 2)
        assert simulator.busy_s[Lane.CPU] == pytest.approx(6)
