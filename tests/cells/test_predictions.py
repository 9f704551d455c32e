"""What a record keeps of a prediction: for which policy, and what is asked again once it is known which one ran."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_bench.cells.expected_time import Expected
from flexgen_bench.cells.local_rates import LocalRates
from flexgen_bench.cells.work import divide
from flexgen_bench.config.cell import Cell
from flexgen_bench.core.cell import CellSpec, ModelSpec
from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.compression import EXACT, Compression, Lossy
from flexgen_bench.core.model import DType
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.simulated import SystemModel
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.planner.progress import listening
from flexgen_bench.runner import searches
from flexgen_bench.runner.predictions import (
    FOUR_BITS,
    PredictionRequest,
    as_recorded,
    predict,
    predict_policy,
    simulate,
)
from tests.support.planner_machines import MIB, host, small_opt

CPU = Placement.all_on(Tier.CPU)
ENGINE = SystemModel("flexgen_bench.planner.engine_predictor:EnginePredictor", follows_policy=True)
SLOWER = Policy(1, 2, Placement(cpu=0.5, disk=0.5), CPU, CPU)


def request(model: SystemModel = ENGINE, policy: Policy | None = None, name: str = "") -> PredictionRequest:
    spec = CellSpec(
        "s",
        "m:S",
        ModelSpec(small_opt()),
        Workload("w", PromptKind.SYNTHETIC, 8, 32, 4),
        host(64 * MIB),
        DType.FLOAT16,
        1,
        policy=policy,
    )
    return PredictionRequest(Cell(name, spec, model=model), 8)


def test_the_policy_that_ran_is_predicted_and_named(tmp_path: Path) -> None:
    first = as_recorded(predict(request(), EXACT, tmp_path))
    assert first["status"] == "ok"
    assert first["policy"] != to_json(SLOWER)
    row = predict_policy(request(), to_json(SLOWER), tmp_path)
    assert row is not None
    again = as_recorded(row)
    assert again["policy"] == to_json(SLOWER)
    assert again["tok_per_s"] < first["tok_per_s"]
    given = as_recorded(predict(request(policy=SLOWER), EXACT, tmp_path))
    assert again == given


def test_a_policy_brings_its_own_compression(tmp_path: Path) -> None:
    lossy = Lossy(weights=Compression(4))
    row = predict_policy(request(), to_json(replace(SLOWER, lossy=lossy)), tmp_path)
    assert row is not None
    assert row.lossy == lossy
    assert from_json(Policy, as_recorded(row)["policy"], "policy").lossy == lossy


def test_a_policy_without_room_is_told_as_such(tmp_path: Path) -> None:
    huge = Policy(8, 100_000, CPU, CPU, CPU)
    many = replace(request(), num_prompts=800_000)
    row = predict_policy(many, to_json(huge), tmp_path)
    assert row is not None
    told = as_recorded(row)
    assert told["status"] == "oom"
    assert told["policy"] == to_json(huge)
    assert "needs" in told["reason"]


@pytest.mark.parametrize("said", [{}, {"batch": 4}, {"gpu_batch_size": -1}])
def test_words_that_are_no_policy_are_not_predicted(said: dict[str, int], tmp_path: Path) -> None:
    assert predict_policy(request(), said, tmp_path) is None


def test_a_system_without_policies_names_none(tmp_path: Path) -> None:
    plain = request(SystemModel("tests.support.fake_predictors:Plain"))
    assert "policy" not in as_recorded(predict(plain, EXACT, tmp_path))


def _searched(system: SystemModel, cache: Path) -> list[list[str]]:
    """Tokens/s and labels of a cell that is searched for exactly and compressed, and of a plain one."""
    cells = [
        replace(request(system, name="one"), also=(FOUR_BITS,)),
        request(SystemModel("tests.support.fake_predictors:Plain"), name="two"),
    ]
    told: list[str] = []
    found = list(simulate(cells, cache, told.append))
    assert [line for line in told if line.startswith("predicting")] == [
        f"predicting {cell.cell.label}" for cell in cells
    ]
    return [
        [f"{row.label} {row.status} {row.prediction and row.prediction.tok_per_s}" for row in rows] for rows in found
    ]


def test_several_processes_find_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searches, "cores", lambda: 1)
    alone = _searched(ENGINE, tmp_path / "alone")
    monkeypatch.setattr(searches, "cores", lambda: 2)
    assert _searched(ENGINE, tmp_path / "together") == alone
    assert [len(rows) for rows in alone] == [2, 1]


def test_a_search_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked the title command saw nothing for half a minute."""
    shares: list[float] = []
    with listening(shares.append):
        predict(request(), EXACT, tmp_path)
    assert len(shares) > 5
    assert shares == sorted(shares)
    assert 0 <= shares[0] < 0.25 < shares[-1] <= 1
    monkeypatch.setattr(searches, "cores", lambda: 1)
    monkeypatch.setattr(searches, "_EVERY_S", 0.0)
    told: list[str] = []
    list(simulate([request(name="one")], tmp_path, told.append))
    assert told[0].startswith("searching for a policy: one s ")
    assert any("% of the search done in" in line for line in told)
    again: list[str] = []
    list(simulate([request(name="one")], tmp_path, again.append))
    assert again == [f"predicting {request(name='one').cell.label}"]


def test_a_process_that_dies_leaves_its_search_to_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory is short and the kernel ends one of them."""
    monkeypatch.setattr(searches, "cores", lambda: 2)
    mortal = SystemModel("tests.support.fake_predictors:DiesElsewhere", follows_policy=True)
    monkeypatch.setenv("FAKE_PREDICTOR_HOME", str(os.getpid()))
    assert _searched(mortal, tmp_path)[0][0].startswith("s ok")


@pytest.mark.parametrize(
    ("model", "policy", "is_asked_again"),
    [(ENGINE, None, True), (ENGINE, SLOWER, False), (SystemModel("tests.support.fake_predictors:Plain"), None, False)],
)
def test_who_is_asked_again(model: SystemModel, policy: Policy | None, is_asked_again: bool, tmp_path: Path) -> None:
    """Systems that follow policies and were given none."""

    cell = request(model, policy).cell
    # Rates are the profile's.
    expected = Expected(LocalRates(tmp_path, lambda cell: False, lambda text: None), tmp_path)
    work = divide([cell], tmp_path, expected)
    [planned] = work.measure
    assert planned.forecast is not None
    assert planned.cell.chooses_policy == is_asked_again
    if is_asked_again:
        recorded = planned.forecast.of_policy(to_json(SLOWER))
        assert recorded is not None
        assert recorded["policy"] == to_json(SLOWER)
