"""The sentence that says why a policy is what it is: of figures that can be found again in the plan and in what was
simulated."""

from __future__ import annotations

import re

from flexgen_bench.config.build import hardware_profile
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.core.units import format_bytes
from flexgen_bench.planner.engine_predictor import EnginePredictor
from flexgen_bench.planner.search import Search
from flexgen_bench.planner.why import busy_shares, way_of_working, why
from tests.planner.test_search import MACHINES, job_on, space_of


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
