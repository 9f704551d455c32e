"""Scores of generated text, as functions that lm-eval calls with a document and what the model answered.

``METRICS_OF`` says which metrics each gives; conf/accuracy is checked against it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_STATED = re.compile(r"answer is\s*:?\s*(-?\$?\.?\d[\d,]*(?:\.\d+)?)", re.IGNORECASE)


def answer_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """``exact_match`` and token ``f1`` against the best of ``doc["answers"]``, as SQuAD's script defines them.

    (Rajpurkar et al. 2016: lower case, no punctuation, no articles.) HELM calls the first quasi exact match.
    """
    answer = normalise(results[0])
    references = [normalise(reference) for reference in doc["answers"]]
    return {
        "exact_match": float(answer in references),
        "f1": max(token_f1(answer, reference) for reference in references),
    }


def text_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """``exact_match`` of the text but for spaces around it, and token ``f1`` as above; the reference is
    ``doc["answer"]``.

    For generated tasks, where signs are part of the answer.
    """
    answer, reference = " ".join(results[0].split()), str(doc["answer"])
    return {"exact_match": float(answer == reference), "f1": _f1(answer.split(), reference.split())}


def number_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Of an answer that is reached in steps: ``exact_match``, whether the last number of the text is ``doc["answer"]``
    (lm-eval's ``flexible-extract``); ``stated``, whether the one that it says is the answer is."""
    wanted = _number(str(doc["answer"]))
    numbers, stated = _NUMBER.findall(results[0]), _STATED.findall(results[0])
    return {
        "exact_match": float(bool(numbers) and _number(numbers[-1]) == wanted),
        "stated": float(bool(stated) and _number(stated[0]) == wanted),
    }


def _number(text: str) -> float:
    return float(text.replace(",", "").replace("$", ""))


def rouge_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2 and -L F-measures with stemming (``rouge_score``) against ``doc["summary"]``, in 0..1."""
    scores = _rouge().score(doc["summary"], results[0].strip())
    return {name: float(score.fmeasure) for name, score in scores.items()}


def f1_of_matches(pairs: Sequence[tuple[int, int]]) -> float:
    """F1 of the class 1 over (right, predicted) pairs: an aggregation. 0 if nothing is or is called a match.

    lm-eval's own ``f1`` draws 100,000 bootstrap samples of it, through a slow function, in minutes; intervals are made
    elsewhere (``accuracy.statistics``).
    """
    # int: lm-eval's predictions are NumPy's, and the sum of two of its truth values is a truth value.
    hits = sum(int(right == predicted == 1) for right, predicted in pairs)
    marked = sum(int(right == 1) + int(predicted == 1) for right, predicted in pairs)
    return 2 * hits / marked if marked else 0.0


# Which function of sums over items it is (``accuracy.statistics``).
f1_of_matches.statistic = "f1"  # type: ignore[attr-defined]

METRICS_OF: Mapping[str, tuple[str, ...]] = {
    "flexgen_bench.accuracy.data.metrics.answer_scores": ("exact_match", "f1"),
    "flexgen_bench.accuracy.data.metrics.number_scores": ("exact_match", "stated"),
    "flexgen_bench.accuracy.data.metrics.text_scores": ("exact_match", "f1"),
    "flexgen_bench.accuracy.data.metrics.rouge_scores": ("rouge1", "rouge2", "rougeL"),
}


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words; both normalised. Two empty texts agree."""
    return _f1(answer.split(), reference.split())


def _f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    if not answer or not reference:
        return float(list(answer) == list(reference))
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
