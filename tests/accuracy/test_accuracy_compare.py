"""Paired statistics against what is known in closed form, and verdicts on records made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from flexgen_bench.accuracy.compare.compare import Margins, Verdict, combined, compare_modes, compare_task
from flexgen_bench.accuracy.compare.statistics import (
    Discordance,
    bootstrap_p_value,
    holm,
    mean_of,
    paired_difference,
    score,
)
from flexgen_bench.core.accuracy import TaskRecord
from flexgen_bench.core.errors import UserError
from tests.support.accuracy_factory import (
    choice_item,
    choice_items,
    perplexity_record,
    subject,
    task_record,
    text_items,
)

MARGINS = Margins()


def addends(values: list[float]) -> np.ndarray:
    return np.stack([np.array(values, dtype=float), np.ones(len(values))], axis=1)


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    random = np.random.default_rng(0)
    before = random.normal(0.0, 1.0, 400)
    after = before + random.normal(0.3, 0.5, 400)
    found = paired_difference(addends(list(before)), addends(list(after)), "mean")
    change = after - before
    half = 1.96 * change.std(ddof=1) / 20
    interval = found.interval()
    assert interval.value == pytest.approx(change.mean())
    assert interval.low == pytest.approx(change.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(change.mean() + half, abs=0.1 * half)


def test_pairing_removes_what_items_have_in_common() -> None:
    """Items differ far more than the runs do; an unpaired comparison would see nothing."""
    random = np.random.default_rng(1)
    before = random.normal(0.0, 100.0, 300)
    found = paired_difference(addends(list(before)), addends(list(before + 0.1)), "mean").interval()
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(2)
    hits = 0
    for trial in range(200):
        before = random.random(150) < 0.6
        after = np.where(random.random(150) < 0.2, random.random(150) < 0.35, before)
        truth = 0.2 * (0.35 - 0.6)
        interval = paired_difference(
            addends(list(before)), addends(list(after)), "mean", resamples=800, seed=trial
        ).interval()
        hits += interval.low <= truth <= interval.high
    assert 178 <= hits <= 199  # 190 expected


def test_the_same_seed_gives_the_same_draws() -> None:
    parts = addends([0.0, 1.0, 1.0, 0.0, 1.0])
    first, second = (paired_difference(parts, parts[::-1], "mean") for _ in range(2))
    assert np.array_equal(first.draws, second.draws)


def test_clusters_widen_the_interval() -> None:
    """Forty questions of each of ten subjects that change together are ten observations, not four hundred."""
    random = np.random.default_rng(3)
    shift = np.repeat(random.normal(0, 0.1, 10), 40)
    before = random.random(400)
    clusters = [i // 40 for i in range(400)]
    alone = paired_difference(addends(list(before)), addends(list(before + shift)), "mean").interval()
    together = paired_difference(addends(list(before)), addends(list(before + shift)), "mean", clusters).interval()
    assert together.high - together.low > 4 * (alone.high - alone.low)
    assert together.value == pytest.approx(alone.value)


@pytest.mark.parametrize(
    ("statistic", "parts", "expected"),
    [
        ("mean", [(1, 1), (0, 1)], 0.5),
        ("exp_ratio", [(3.0, 2), (1.0, 2)], math.e),
        ("bits", [(math.log(4), 1), (0.0, 1)], 1.0),
        ("f1", [(1, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)], 2 / 3),
        ("f1", [(0, 0, 0)], 0.0),
    ],
)
def test_scores_are_functions_of_sums(statistic: str, parts: list, expected: float) -> None:
    assert score(np.array(parts, dtype=float), statistic) == pytest.approx(expected)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (10, 2), (7, 7), (50, 30)])
def test_mcnemar_is_the_binomial_test(lost: int, won: int) -> None:
    found = Discordance(lost, won).p_value
    n, least = lost + won, min(lost, won)
    tail = sum(math.comb(n, k) for k in range(least + 1)) / 2**n
    assert found == pytest.approx(min(1.0, 2 * tail))


def test_tangos_interval() -> None:
    """No discordant pair: +-z^2 / (n + z^2). Many: the normal one. Always at the score's own level at its ends."""
    z = stats.norm.ppf(0.95)
    none = Discordance(0, 0).tango(60, 0.9)
    assert none.high == pytest.approx(z * z / (60 + z * z), rel=1e-6)
    assert none.low == pytest.approx(-none.high, rel=1e-6)
    # Agresti, Categorical Data Analysis: 150 and 86 of 1600 changed their approval; 95 % Wald interval 0.021 to 0.059.
    many = Discordance(150, 86).tango(1600, 0.95)
    assert many.low == pytest.approx(-0.0587, abs=0.001)
    assert many.high == pytest.approx(-0.0213, abs=0.001)


def test_holm_adjusts_step_by_step() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert found == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


def test_the_bootstraps_p_value() -> None:
    random = np.random.default_rng(4)
    before = list(random.normal(0, 1, 200))
    shifted = paired_difference(addends(before), addends([x + 1 for x in before]), "mean")
    assert bootstrap_p_value(shifted) < 0.001
    same = paired_difference(addends(before), addends(before), "mean")
    assert bootstrap_p_value(same) == 1.0


def test_the_mean_of_tasks_is_narrower_than_each() -> None:
    random = np.random.default_rng(5)
    tasks = []
    for seed in range(9):
        before = random.random(200)
        after = before + random.normal(0, 0.1, 200)
        tasks.append(paired_difference(addends(list(before)), addends(list(after)), "mean", seed=seed))
    widths = [t.interval().high - t.interval().low for t in tasks]
    mean = mean_of(tasks)
    assert mean.high - mean.low == pytest.approx(np.mean(widths) / 3, rel=0.15)


def test_equal_answers_of_few_items_prove_nothing() -> None:
    """With 60 items, equal answers leave room for more than two points; with 500 they do not."""
    for n, verdict in ((60, Verdict.UNDECIDED), (500, Verdict.EQUIVALENT)):
        items = choice_items(n, 0.6)
        found = compare_task(task_record(items), task_record(items, "w4"), MARGINS)
        assert found.verdict is verdict
        assert found.change.value == 0
        assert found.identical
        assert found.same_predictions == n


def test_nothing_right_twice_is_no_equivalence() -> None:
    """Matching restaurants: SmolLM2 says no to every pair, compressed or not. The bootstrap of that has no width, and
    the page said equivalent."""

    def record(hits: int, mode: str) -> TaskRecord:
        parts = [(1.0, 0.0, 0.0)] * hits + [(0.0, 0.0, 1.0)] * (50 - hits) + [(0.0, 0.0, 0.0)] * 150
        items = [
            replace(item, parts=part, loglik=(), bytes=(), gold=None)
            for item, part in zip(choice_items(200, 0.5), parts, strict=True)
        ]
        return task_record(items, mode, metric="f1", statistic="f1")

    never = compare_task(record(0, "exact"), record(0, "w4"), MARGINS)
    assert (never.reference, never.score, never.verdict) == (0, 0, Verdict.UNDECIDED)
    assert combined([never], MARGINS).score is None, "nor does it count in the mean"
    wrong = choice_items(5000, 0.0)
    assert compare_task(task_record(wrong), task_record(wrong, "w4"), MARGINS).verdict is Verdict.UNDECIDED
    # Equal answers have a width as in other tasks, and enough of them are equivalent.
    some = compare_task(record(20, "exact"), record(20, "w4"), MARGINS)
    assert some.sure.low == pytest.approx(-0.0133, abs=1e-4)
    assert some.verdict is Verdict.EQUIVALENT


def test_a_loss_is_found() -> None:
    exact = choice_items(500, 0.7)
    right = [i for i, item in enumerate(exact) if item.correct]
    worse = choice_items(500, 0.7, flip=right[:60])
    found = compare_task(task_record(exact), task_record(worse, "w3"), MARGINS)
    assert (found.lost, found.won) == (60, 0)
    assert found.change.value == pytest.approx(-60 / 500)
    assert found.change.low < -0.12 < found.change.high < -0.08
    assert found.verdict is Verdict.WORSE
    assert found.p < 1e-6
    assert not found.identical


def test_perplexity_is_judged_by_bits_per_byte() -> None:
    exact = perplexity_record(text_items(80))
    little = perplexity_record(text_items(80, extra_loss=0.5), "w8")
    much = perplexity_record(text_items(80, extra_loss=6.0), "w4")
    found = compare_task(exact, little, MARGINS)
    assert found.verdict is Verdict.EQUIVALENT
    assert found.bits is not None
    assert found.bits.value == pytest.approx(0.5 / 100 / math.log(2), rel=0.1)
    assert compare_task(exact, much, MARGINS).verdict is Verdict.WORSE
    assert found.score > found.reference  # perplexity goes up
    assert found.difference.value < 0  # which is not better


def test_equal_answers_of_few_items_prove_nothing_in_sum_either() -> None:
    few = {name: choice_items(8, 0.6, seed) for seed, name in enumerate("abc")}
    exact = {name: task_record(items, task=name) for name, items in few.items()}
    mode = {name: task_record(items, "w4", name) for name, items in few.items()}
    found = compare_modes(exact, mode, MARGINS)
    assert found.verdict is Verdict.UNDECIDED
    assert found.sure is not None
    alone = Discordance(0, 0).tango(8, 0.9).high
    assert found.sure.high == pytest.approx(alone / math.sqrt(3))


def test_overall_each_task_counts_the_same() -> None:
    exact = {name: task_record(choice_items(400, 0.6, seed), task=name) for seed, name in enumerate("abcd")}
    right = [i for i, item in enumerate(exact["a"].items) if item.correct]
    mode = {name: replace(r, subject=subject("w4")) for name, r in exact.items()}
    mode["a"] = task_record(choice_items(400, 0.6, 0, flip=right[:80]), "w4", "a")
    found = compare_modes(exact, mode, MARGINS)
    assert found.score is not None
    assert found.score.value == pytest.approx(-0.05)
    assert found.verdict is Verdict.WORSE
    assert found.having(Verdict.WORSE) == ["a"]
    assert found.worst is not None
    assert found.worst.task == "a"
    assert {t.p_holm for t in found.tasks if t.task != "a"} == {1.0}


def test_only_common_items_are_compared() -> None:
    exact, mode = choice_items(50, 0.5), choice_items(30, 0.5)
    found = compare_task(task_record(exact), task_record(mode, "w4"), MARGINS)
    assert (found.n, found.unpaired) == (30, 20)
    with pytest.raises(UserError, match="those of the reference"):
        compare_task(task_record(exact[:3]), task_record([choice_item(99, True)], "w4"), MARGINS)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"task_version": "2"}, "task version"),
        ({"data_sha256": {"data": "1" * 64}}, "data"),
        ({"metric": "acc_norm"}, "metric"),
        ({"subject": subject("w4", fingerprint="other")}, "weights"),
    ],
)
def test_records_of_different_things_are_refused(changes: dict, what: str) -> None:
    items = choice_items(20, 0.5)
    with pytest.raises(UserError, match=what):
        compare_task(task_record(items), task_record(items, "w4", **changes), MARGINS)


@pytest.mark.parametrize("value", [0, -1, 1.5, "a", True])
def test_a_margin_is_a_small_number(value: object) -> None:
    with pytest.raises(UserError, match=r"margin\.score"):
        Margins(score=value)  # type: ignore[arg-type]
