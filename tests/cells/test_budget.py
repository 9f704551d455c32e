"""What is left out of a workload for a budget, and how long cells are expected to take."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import initialize_config_dir

from flexgen_bench.cells.budget import LEAST_PROMPTS, LEAST_TOKENS, fitted
from flexgen_bench.cells.compose import composed, plan
from flexgen_bench.cells.expected_time import REFUSED_S, STARTUP_S, Expected, cell_seconds, search_seconds
from flexgen_bench.cells.local_rates import LocalRates
from flexgen_bench.cells.this_machine import ThisMachine
from flexgen_bench.config.cell import Cell
from flexgen_bench.config.paths import conf_dir
from flexgen_bench.core.cell import CellSpec, MeasureSpec, ModelSpec
from flexgen_bench.core.compression import EXACT
from flexgen_bench.core.model import DType
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.simulated import SystemModel
from flexgen_bench.core.status import Status
from flexgen_bench.core.units import GIB
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.runner.predictions import exactly, predict
from tests.support.planner_machines import host, small_opt

PAPER = Workload("32-32", PromptKind.SYNTHETIC, 24, 32, 32)
SLOW = {"slow": 1.0, "quick": 0.1, "unknown": None}  # seconds for a prompt and a token


def asked_for(workload: Workload, systems: Collection[str]) -> Mapping[str, float]:
    size = workload.num_prompts * workload.gen_len
    return {n: size * s for n in systems if (s := SLOW[n]) is not None}


@pytest.mark.parametrize(
    ("budget_s", "prompts", "tokens"),
    [
        (1000, 24, 32),
        (767, 24, 16),  # one second too little
        (384, 24, 16),
        (200, 24, 8),
        (96, 24, 4),
        (95, 16, 4),
        (20, 4, 4),
        (1, LEAST_PROMPTS, LEAST_TOKENS),
    ],
)
def test_tokens_are_halved_first_then_prompts(budget_s: float, prompts: int, tokens: int) -> None:
    fit = fitted(PAPER, budget_s, list(SLOW), asked_for)
    ran = replace(PAPER, **fit.changes)
    assert (ran.num_prompts, ran.gen_len) == (prompts, tokens)
    assert bool(fit.note) == (ran != PAPER)
    if fit.note:
        assert f"reduced to {prompts} prompts and {tokens} generated tokens each" in fit.note
        assert "slow is predicted to take 12m 48s for 24 prompts and 32 generated" in fit.note
        assert ("still more than that: slow" in fit.note) == (budget_s == 1)


def test_what_was_stated_stays_and_small_workloads_grow_never() -> None:
    fit = fitted(PAPER, 1, list(SLOW), asked_for, stated={"gen_len"})
    assert fit.changes == {"num_prompts": 4}
    fit = fitted(PAPER, 1, list(SLOW), asked_for, stated={"gen_len", "num_prompts"})
    assert not fit.changes
    assert "not reduced" in fit.note
    small = replace(PAPER, num_prompts=2, gen_len=3)
    assert not fitted(small, 0.1, list(SLOW), asked_for).changes


def test_only_systems_over_the_budget_are_asked_again() -> None:
    """A search for a policy takes seconds."""
    asked: list[set[str]] = []

    def counting(workload: Workload, systems: Collection[str]) -> Mapping[str, float]:
        asked.append(set(systems))
        return asked_for(workload, systems)

    fitted(PAPER, 100, list(SLOW), counting)
    assert asked == [set(SLOW), {"slow"}, {"slow"}, {"slow"}]


PREDICTED = Prediction(10.0, 62.0, 32, 32, 32, 16)  # two blocks: a step takes a second


def test_the_search_for_a_batch_counts() -> None:
    """8: a quarter of the prefill, and a step; 32: all of it. One size alone is not searched for."""
    assert search_seconds(PREDICTED, MeasureSpec(batch_sizes=(8, 32))) == pytest.approx(14.5)
    assert search_seconds(PREDICTED, MeasureSpec(batch_sizes=(1, 64))) == pytest.approx(1 + 10 + 2)
    assert search_seconds(PREDICTED, MeasureSpec(batch_sizes=(32, 64))) == 0
    assert search_seconds(PREDICTED, MeasureSpec()) == 0


def cell(model: str | None, measure: MeasureSpec | None = None) -> Cell:
    spec = CellSpec(
        "s",
        "m:S",
        ModelSpec(small_opt()),
        Workload("w", PromptKind.SYNTHETIC, 8, 32, 4),
        host(GIB),
        DType.FLOAT16,
        1,
        measure=measure or MeasureSpec(repetitions=2, warmup=1),
    )
    return Cell("", spec, (), SystemModel(None if model is None else f"tests.support.fake_predictors:{model}"))


@pytest.mark.parametrize(
    ("model", "status"),
    [
        ("Plain", Status.OK),
        ("TooLarge", Status.OOM),
        ("Impossible", Status.UNAVAILABLE),
        ("Mistaken", Status.FAILED),
        (None, Status.UNAVAILABLE),
    ],
)
def test_seconds_of_a_cell(model: str | None, status: Status, tmp_path: Path) -> None:
    """Three generations of 16 s, the process and loading; a refusal is quick; nobody knows of what has no model."""
    given = cell(model)
    row = predict(exactly(given), EXACT, tmp_path)
    assert row.status is status
    seconds = cell_seconds(row)
    if status is Status.OK:
        assert seconds is not None
        assert 48 + STARTUP_S < seconds < 48 + STARTUP_S + 5
    elif model in ("TooLarge", "Impossible"):
        assert seconds == REFUSED_S
    else:
        assert seconds is None


def expected(cache: Path) -> Expected:
    return Expected(LocalRates(cache, lambda cell: False, lambda text: None), cache)


def test_the_cells_of_this_machine_shrink_together(tmp_path: Path) -> None:
    lines: list[str] = []
    cells = {"a": cell("Plain"), "b": cell("TooLarge")}
    here = ThisMachine(expected(tmp_path), False, lines.append)
    assert here.fitted(cells, 100, ()).changes == {}
    assert here.fitted(cells, 40, ()).changes == {"num_prompts": 4}
    [line] = lines
    assert "a is predicted to take" in line


def test_without_rates_nothing_shrinks_and_it_is_said(tmp_path: Path) -> None:
    lines: list[str] = []
    known = cell("Plain")
    unknown = replace(known, spec=replace(known.spec, hardware=replace(known.spec.hardware, rates=None)))
    here = ThisMachine(expected(tmp_path), False, lines.append)
    assert here.fitted({"a": unknown}, 1, ()).changes == {}
    assert "rates are not known" in lines[0]


def test_the_default_suite_has_a_budget_for_every_cell(tmp_path: Path) -> None:
    """Accelerate took ten minutes for a cell where bfloat16 is slow, and the suite ended with an error."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        conf = composed([])
        assert conf.suite is not None
        for group in conf.suite.cells:
            budgets = [o for o in group.overrides if o.startswith("measure.budget_s=")]
            assert budgets, group.name
            assert float(budgets[0].partition("=")[2]) <= 90
        assert {c.subject for c in plan(conf, [], "default").cells if c.spec.system == "flexgen"} == {True}
