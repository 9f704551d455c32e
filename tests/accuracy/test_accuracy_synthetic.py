"""Generated tasks: their answers are right, judged by other means than those that made them, and the same
everywhere."""

from __future__ import annotations

import re

import numpy as np
import pytest

from flexgen_bench.accuracy.data.metrics import answer_scores, f1_of_matches, rouge_scores, text_scores
from flexgen_bench.accuracy.data.synthetic import SIGNS, copying, lookup, matches, reasoning
from flexgen_bench.accuracy.data.synthetic_natural import reasoning as natural


def everything(rows: dict[str, list[dict[str, str]]]) -> list[dict[str, str]]:
    return [row for part in rows.values() for row in part]


def test_copying() -> None:
    rows = everything(copying(items=40, examples=3, seed=3, longest=9))
    assert all(row["answer"] == row["words"] for row in rows)
    assert {len(row["words"].split()) for row in rows} <= set(range(4, 10))


def test_lookup_is_settled_and_spread_over_the_list() -> None:
    rows = everything(lookup(items=200, examples=1, seed=4, pairs=10))
    for row in rows:
        table = dict(line.split(": ") for line in row["listing"].split("\n"))
        assert len(table) == 10
        assert table[row["asked"]] == row["answer"]
    assert {row["position"] for row in rows} == set(range(10))


def _substituted(line: str) -> dict[str, str]:
    return dict(re.findall(r'([A-Z]) by "([^"]*)"', line))


def test_variable_substitution() -> None:
    for row in everything(reasoning(mode="variable_substitution", items=60, examples=2, seed=1)):
        rule, case, _ = row["question"].split("\n")
        text = rule.removeprefix("Rule: ")
        for variable, words in _substituted(case).items():
            text = re.sub(rf"\b{variable}\b", words, text)
        assert text == row["answer"]


def test_induction() -> None:
    for row in everything(reasoning(mode="induction", items=60, examples=2, seed=1)):
        for line in row["question"].split("\n")[:2]:
            text = row["answer"]
            for variable, words in _substituted(line).items():
                text = re.sub(rf"\b{variable}\b", words, text)
            assert line.endswith(f"gives: {text}")


def test_pattern_match_has_one_answer() -> None:
    for row in everything(reasoning(mode="pattern_match", items=60, examples=2, seed=1)):
        lines = row["question"].split("\n")
        rules, result = lines[1:5], lines[5].removeprefix("Result: ")
        fitting = [rule for rule in rules if re.fullmatch(_as_pattern(rule), result)]
        assert fitting == [row["answer"]]


def _as_pattern(rule: str) -> str:
    parts, seen = [], set()
    for symbol in rule.split():
        if symbol in SIGNS:
            parts.append(re.escape(symbol))
        elif symbol in seen:
            parts.append(f"(?P={symbol})")
        else:
            seen.add(symbol)
            parts.append(rf"(?P<{symbol}>[a-z]+(?: [a-z]+)*)")
    return " ".join(parts)


@pytest.mark.parametrize(
    ("rule", "words", "fits"),
    [
        ("X X +", "a b a b +", True),
        ("X X +", "a b a c +", False),
        ("X + Y", "a + b c", True),
        ("X + Y", "a - b", False),
        ("X Y", "a", False),
    ],
)
def test_matching(rule: str, words: str, fits: bool) -> None:
    assert matches(rule.split(), words.split()) is fits


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_natural_reasoning(difficulty: str) -> None:
    """Forward chaining over the sentences themselves gives what the answer says."""
    for row in everything(natural(difficulty=difficulty, items=60, examples=2, seed=2)):
        text = row["question"]
        rules = re.findall(r"If .*? is (.*), then .*? is (\w+)\.", text)
        fact = re.search(r"Fact:\n.*? is (.*)\.\n", text)
        assert fact
        known = set(re.split(r", | and ", fact[1]))
        given = set(known)
        while new := {r for c, r in rules if set(c.split(" and ")) <= known} - known:
            known |= new
        answer = re.split(r", | and ", row["answer"].partition(" is ")[2].rstrip("."))
        assert set(answer) == known - given
        assert (len(answer) == 1) is (difficulty == "easy")
        assert len(rules) == 5


def test_seeds_decide() -> None:
    assert copying(items=5, examples=1, seed=1, longest=9) == copying(items=5, examples=1, seed=1, longest=9)
    assert copying(items=5, examples=1, seed=1, longest=9) != copying(items=5, examples=1, seed=2, longest=9)


def test_answer_scores() -> None:
    doc = {"answers": ["The Eiffel Tower", "tour Eiffel"]}
    assert answer_scores(doc, [" the eiffel tower."]) == {"exact_match": 1.0, "f1": 1.0}
    assert answer_scores(doc, ["Eiffel"])["f1"] == pytest.approx(2 / 3)
    assert answer_scores(doc, [""]) == {"exact_match": 0.0, "f1": 0.0}


def test_signs_count_in_generated_tasks() -> None:
    doc = {"answer": "A + B ="}
    assert text_scores(doc, [" A + B ="])["exact_match"] == 1.0
    assert text_scores(doc, ["A - B ="]) == {"exact_match": 0.0, "f1": 0.75}


def test_rouge() -> None:
    pytest.importorskip("rouge_score")
    doc = {"summary": "the cat sat on the mat"}
    assert rouge_scores(doc, ["the cat sat on the mat"])["rougeL"] == 1.0
    scores = rouge_scores(doc, ["a cat sat"])
    assert scores["rouge1"] == pytest.approx(2 * 2 / (3 + 6))
    assert scores["rouge2"] == pytest.approx(2 * 1 / (2 + 5))


def test_f1_of_matches() -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    # As lm-eval gives them. With NumPy's truth values a match that was found once counted as one of two marks.
    pairs = [(r, np.int64(p)) for r, p in ((1, 1), (1, 0), (0, 1), (0, 0), (1, 1), (0, 1))]
    right, predicted = zip(*pairs, strict=True)
    assert f1_of_matches(pairs) == pytest.approx(sklearn_metrics.f1_score(right, predicted))
    assert f1_of_matches([(0, 0)]) == 0.0
