"""The sentence that says why a policy is what it is: of figures that can be found again in the plan and in what was
simulated."""

from __future__ import annotations

import re
from dataclasses import replace

from flexgen_bench.config.build import hardware_profile
from flexgen_bench.core.policy import AttentionSite, Offloaded, Placement, Policy
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.core.units import format_bytes
from flexgen_bench.planner.engine_predictor import EnginePredictor
from flexgen_bench.planner.search import Search
from flexgen_bench.planner.why import Alternative, busy_shares, way_of_working, why
from tests.planner.test_search import CPU, MACHINES, job_on, machine, space_of


def test_the_sentence_has_the_plans_figures() -> None:
    of = space_of(MACHINES["host"])
    found = Search(of).run()
    told = why(of, found.plan, found.forecast, found.other)
    shares = busy_shares(found.forecast, of.job.hardware)
    most = max(shares.values())
    assert f"{most:.0%}" in told
    for kind in ("weights", "kv_cache"):
        assert format_bytes(sum(p.get(kind, 0) for p in found.plan.bytes.values())) in told
    assert EnginePredictor({}, {}).predict(job_on(MACHINES["host"], 8)).settings["why"]


def test_what_it_is_compared_with_was_simulated_and_is_slower() -> None:
    of = space_of(MACHINES["host"])
    search = Search(of)
    found = search.run()
    other = found.other
    assert other is not None
    assert way_of_working(other.policy) != way_of_working(found.policy)
    assert 0 < other.part <= 1
    assert search.tok_per_s(other.policy) / search.tok_per_s(found.policy) == other.part
    told = why(of, found.plan, found.forecast, other)
    lost = re.search(r"is ([0-9.]+)% slower", told)
    assert (lost is not None and abs(float(lost[1]) / 100 - (1 - other.part)) < 0.006) or "as good" in told


def test_lanes_that_share_a_link_are_not_both_counted_as_busy() -> None:
    """Two lanes that slow each other down on one link were said to keep it busy for 101 % of a job."""
    machine = hardware_profile("rtx3090")
    half = Placement(cpu=0.5, gpu=0.5)
    policy = Policy(8, 2, Placement.all_on(Tier.CPU), Placement.all_on(Tier.CPU), half)
    search = Search(space_of(machine))
    assert search.tok_per_s(policy)
    shares = busy_shares(search.choice(policy, None, ()).forecast, machine)
    assert 0 < shares[Lane.H2D] <= 1
    assert Lane.H2D_WEIGHTS not in shares


def test_only_what_has_no_room_is_said_to_have_none() -> None:
    """Weights that a policy puts into host memory were "more than the gpu memory of 64 MiB has room for", all 1.6 MB of
    them."""
    for room, has_room in ((64, True), (3.7, False)):
        of = space_of(machine(room))
        policy = Policy(4, 2, CPU, CPU, CPU)
        told = why(of, of.plan(policy), Search(of).choice(policy, None, ()).forecast, None)
        assert "in host memory" in told
        assert told.count("more than") == (0 if has_room else 2)


def test_the_moved_share_is_of_all_of_the_cache() -> None:
    """Half of what is in host memory was said of what is on disk, too. Of 8 sequences 4 are there, and 2 are moved."""
    of = space_of(machine(64))
    half = Placement(cpu=0.5, disk=0.5)
    policy = Policy(8, 1, CPU, half, CPU, attention=AttentionSite.CPU, kv_moved=0.5)
    plan = of.plan(policy)
    told = why(of, plan, Search(of).choice(policy, None, ()).forecast, None)
    moved = re.search(r"attends to it there, but for (\d+)% of the cache that is moved", told)
    assert moved is not None
    assert 0.2 < int(moved[1]) / 100 < 0.3


def test_layers_in_place_have_their_cache_read_where_it_is() -> None:
    of = space_of(machine(64))
    for layers, words in ((CPU, "where the processor computes"), (Placement(gpu=0.5, cpu=0.5), "that it computes")):
        policy = Policy(8, 1, layers, CPU, CPU, offloaded=Offloaded.IN_PLACE)
        assert words in why(of, of.plan(policy), Search(of).choice(policy, None, ()).forecast, None)


def test_differences_are_those_there_are() -> None:
    """Experts of a model that has none, and "none of the cache moved" of a policy that moves all of it."""
    half = Placement(gpu=0.5, cpu=0.5)
    mine = Policy(4, 2, CPU, CPU, CPU, attention=AttentionSite.CPU, kv_moved=0.5)

    def told(**changed: object) -> str:
        of = space_of(machine(64))
        other = Alternative(replace(mine, **changed), 0.5, {Lane.GPU: 1.0})  # type: ignore[arg-type]
        text = why(of, of.plan(mine), Search(of).choice(mine, None, ()).forecast, other)
        difference = re.search(r"the next best way \((.*)\)", text)
        assert difference is not None
        return difference[1]

    assert told(weights=half) == "weights 50% gpu + 50% cpu"
    assert told(activations=half) == "hidden states 50% gpu + 50% cpu"
    assert told(kv_moved=0.0) == "none of the cache moved"
    assert told(kv_moved=0.0, attention=AttentionSite.COMPUTE) == "attention on the gpu"
    assert told(experts=half) == "experts 50% gpu + 50% cpu"
    gpu = Placement.all_on(Tier.GPU)
    assert told(kv_cache=gpu, kv_moved=0.0, attention=AttentionSite.COMPUTE) == "KV cache 100% gpu"
    assert told(weights=gpu, offloaded=Offloaded.IN_PLACE) == "weights 100% gpu"
