"""What a whole decode pass takes never rises unnoticed: launches with and without graphs, and passes that wait."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import host_counts
import pass_counts

from flexgen_bench.core.model import DType
from flexgen_bench.core.tiers import Lane
from flexgen_bench.models.model import Model
from flexgen_bench.planner.memory_plan import plan_job
from flexgen_bench.planner.recorded_passes import RecordedPasses
from flexgen_bench.schedule.scheduler import Scheduler
from flexgen_bench.schedule.sequence_groups import Request

# Launches of a pass of one micro-batch through six layers at most: without graphs; with them. Who lowers one lowers the
# limit.
LIMITS = {
    "resident": (82, 5),
    "resident, ragged prompts": (85, 5),
    "half of the weights moved": (82, 7),
    "4-bit weights": (84, 10),
}
NO_GRAPHS = {"4-bit KV": 76, "half of the KV moved": 291}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pass-counts")


@pytest.mark.parametrize("case", LIMITS)
def test_no_pass_costs_more_than_it_did(case: str, folder: Path) -> None:
    """By graphs: what was asked for is five launches, and one for each unit whose weights are brought or unpacked."""
    eager, with_graphs = (pass_counts.count_pass(host_counts.CASES[case], folder, graphs) for graphs in (False, True))
    assert eager.launches <= LIMITS[case][0]
    assert with_graphs.launches == LIMITS[case][1], "what the planner counts, too"
    assert with_graphs.launches <= 5 + with_graphs.fetched
    assert (with_graphs.fetched > 0) is ("weights" in case)
    assert eager.waits == with_graphs.waits == 0, "tables and head are on the accelerator"


@pytest.mark.parametrize("case", [*LIMITS, *NO_GRAPHS])
def test_the_planner_knows_which_passes_are_recorded(case: str) -> None:
    """Launches of a decode pass by its own count, which it takes once it is known what one costs."""
    policy = replace(host_counts.CASES[case].policy, gpu_batch_size=2 * host_counts.BATCH, num_gpu_batches=1)
    requests = [Request(host_counts.PROMPT_LEN, host_counts.GEN_LEN)] * host_counts.PROMPTS
    model = Model.of(host_counts.tiny_opt(), DType.FLOAT16, policy.lossy.weights)
    plan = plan_job(model, policy, host_counts.MACHINE, requests)
    scheduler, recorded = Scheduler(policy, plan), RecordedPasses(plan)
    list(scheduler.steps(scheduler.schedule()))
    scheduler.postprocess()
    steps = [step for step in scheduler.steps(scheduler.schedule()) if step.lane is Lane.GPU and not step.on_weights]
    launches = [recorded.launches(step) for step in steps]
    if case in NO_GRAPHS:
        assert set(launches) == {None}
    else:
        assert sum(number or 0 for number in launches) == LIMITS[case][1]


@pytest.mark.parametrize("case", NO_GRAPHS)
def test_nor_does_one_that_is_not_recorded(case: str, folder: Path) -> None:
    counted = pass_counts.count_pass(host_counts.CASES[case], folder, True)
    assert (counted.launches, counted.waits) == (pytest.approx(NO_GRAPHS[case], abs=0.05), 0)


def test_where_tables_are_on_the_host_every_pass_waits(folder: Path) -> None:
    """It has to: what it is fed comes from there."""
    assert pass_counts.count_pass(host_counts.CASES["weights moved"], folder, True).waits > 0
