"""Weights reach an accelerator on a lane of their own, which shares the link of everything else: stated once, simulated
so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_bench.core.codec import from_json
from flexgen_bench.core.compression import EXACT
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.policy import AttentionSite, Placement, Policy, Schedule
from flexgen_bench.core.rates import Rates
from flexgen_bench.core.tiers import LINKS, PHYSICAL_LINKS, Lane, LaneKind, Site, Tier
from flexgen_bench.engine.device import Device
from flexgen_bench.planner.candidates import Candidates
from flexgen_bench.planner.cost import StepTimes
from flexgen_bench.planner.lane_sums import LaneSums
from flexgen_bench.planner.placement_lp import PhaseCost
from flexgen_bench.planner.search_space import SearchSpace
from flexgen_bench.planner.sensitivity import sensitivity
from flexgen_bench.planner.simulator import SharedCores, Simulator, shared_links
from flexgen_bench.schedule.buffer import Buffer
from flexgen_bench.schedule.scheduled_job import ScheduledJob
from flexgen_bench.schedule.steps import Step, StepKind
from tests.support.planner_machines import DTYPE, accelerator, small_opt

LOAD = Step(Lane.H2D_WEIGHTS, StepKind.LOAD_WEIGHTS, 1, writes=(Buffer("weights"),), bytes=100)


def move(number: int, size: int = 10) -> Step:
    return Step(Lane.H2D, StepKind.MOVE_ATTENTION, 1, writes=(Buffer("attn", number),), bytes=size)


def test_links_between_the_same_tiers_are_one_link() -> None:
    assert {Lane(kind).link.kind: ends for kind, ends in LINKS.items()} == {
        kind: LINKS[kind] for kind in PHYSICAL_LINKS
    }
    assert len({LINKS[kind] for kind in PHYSICAL_LINKS}) == len(PHYSICAL_LINKS) == 4
    assert all(lane.link is lane for lane in (Lane.GPU, Lane.CPU, *map(Lane, PHYSICAL_LINKS)))


def test_a_profile_states_the_bandwidth_of_a_link_once() -> None:
    profile = HardwareProfile("gpu", Accelerator.CUDA, links={"h2d": 5e9})
    assert profile.link_rate(Lane.H2D_WEIGHTS) == profile.link_rate(Lane.H2D) == 5e9
    assert profile.link_rate(Lane.D2H) is None
    with pytest.raises(UserError, match=r"one of .*net_in\. .*shares the link of h2d: state the"):
        HardwareProfile("gpu", Accelerator.CUDA, links={"h2d": 5e9, "h2d_weights": 5e9})
    with pytest.raises(UserError, match=r"rates\.links = 'h2d_weights'"):
        from_json(Rates, {"links": {"h2d_weights": 5e9}}, "gpu.rates")


def test_lanes_of_an_emulated_accelerator_share_the_links_that_are_throttled() -> None:
    profile = HardwareProfile("e", Accelerator.EMULATED, 2**20, links={"h2d": 5e9, "disk_read": 1e9})
    lanes = Device.open(profile, 1).lane_settings()
    assert set(lanes) == set(Site.GPU.lanes)
    assert lanes[Lane.H2D].link is lanes[Lane.H2D_WEIGHTS].link is not None
    assert {lane: s.bytes_per_s for lane, s in lanes.items() if s.link} == {
        Lane.H2D: 5e9,
        Lane.H2D_WEIGHTS: 5e9,
        Lane.DISK_READ: 1e9,
    }
    host = Device.open(HardwareProfile("cpu", Accelerator.NONE), 1).lane_settings()
    assert set(host) == {Lane.DISK_READ, Lane.DISK_WRITE, Lane.CPU}


def test_a_simulated_transfer_passes_a_load_at_half_the_bandwidth_each() -> None:
    use = Step(Lane.GPU, StepKind.OUTPUT, 1, reads=(Buffer("weights"), *(Buffer("attn", n) for n in (0, 1))))
    simulator = Simulator(lambda step: StepTimes(step.bytes, 0), contention=shared_links, keep=True)
    simulator.run_pass([LOAD, move(0), move(1), use])
    assert [(e.step.lane, e.begin_s, e.end_s) for e in simulator.events[:3]] == [
        (Lane.H2D, 0.0, pytest.approx(20.0)),
        (Lane.H2D, pytest.approx(20.0), pytest.approx(40.0)),
        (Lane.H2D_WEIGHTS, 0.0, pytest.approx(120.0)),
    ]
    assert simulator.bytes[Lane.H2D] + simulator.bytes[Lane.H2D_WEIGHTS] == 120


def test_who_slows_whom() -> None:
    both = [Lane.H2D, Lane.H2D_WEIGHTS]
    assert shared_links([*both, Lane.D2H, Lane.GPU]) == {
        Lane.H2D: 0.5,
        Lane.H2D_WEIGHTS: 0.5,
        Lane.D2H: 1.0,
        Lane.GPU: 1.0,
    }
    cores = SharedCores({LaneKind.H2D: 0.2})
    # Two lanes copy no more in all than one does alone.
    assert cores([*both, Lane.GPU]) == {**dict.fromkeys(both, 0.5), Lane.GPU: 0.8}
    assert cores([Lane.H2D_WEIGHTS, Lane.GPU]) == {Lane.H2D_WEIGHTS: 1.0, Lane.GPU: 0.8}
    assert cores([Lane.CPU, Lane.GPU]) == {Lane.CPU: 0.5, Lane.GPU: 0.5}


def test_the_closed_form_sums_what_shares_a_link() -> None:
    job = ScheduledJob((), Tier.GPU, AttentionSite.CPU, 2, 2, 1, 1, 1, 1, 1, 1)
    sums = LaneSums(lambda step: StepTimes(step.bytes, 0), True, job)
    assert sums.run_pass([LOAD, move(0), move(1)]) == 120
    assert sums.busy_s[Lane.H2D_WEIGHTS] == 100


A_SPACE = SearchSpace(Job(small_opt(), DTYPE, accelerator(h2d=2e8), 16, 4, 8), (EXACT,))


def test_what_bounds_a_batch_shape_adds_up_what_its_lanes_bring_to_a_link() -> None:
    """Neither h2d nor h2d_weights takes as long as the gpu; both together take longer."""
    solver, shape = Candidates(A_SPACE), Policy(4, 2)
    seconds = {Lane.H2D: 1.0, Lane.H2D_WEIGHTS: 2.0, Lane.GPU: 2.5}
    phase = PhaseCost(seconds, {(kind, Tier.GPU): {} for kind in ("weights", "kv_cache", "activations")})
    [problem, *_] = solver.problems(shape)
    problem = replace(problem, prefill=phase, decode=phase, decode_passes=3)
    for schedule in Schedule:
        bound = solver._bound(replace(shape, schedule=schedule), problem)
        assert bound == pytest.approx(8 * 4 / (3.0 + 3 * 3.0))


def test_a_faster_link_is_faster_for_all_its_lanes_and_told_once() -> None:
    """Weights and caches cross it for all of the time, so 10 % more of it are 10 % more tokens."""
    below = Policy(8, 1, *[Placement.all_on(Tier.CPU)] * 3)
    staging = A_SPACE.plan(below).total(Tier.GPU)
    job = replace(A_SPACE.job, hardware=replace(A_SPACE.job.hardware, gpu_memory_bytes=staging))
    more = sensitivity(replace(A_SPACE, job=job), below, 100.0).more
    assert more["10 % more of h2d"] == pytest.approx(10, abs=1)
    assert {name for name in more if name.startswith("10 %")} <= {
        f"10 % more of {one}" for one in (*PHYSICAL_LINKS, Lane.GPU, Lane.CPU)
    }
