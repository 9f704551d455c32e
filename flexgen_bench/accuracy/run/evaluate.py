"""One task on one lm-eval model: lm-eval's own evaluation, its samples as items, and the answers kept item by item."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import random
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexgen_bench.accuracy.compare.statistics import score
from flexgen_bench.accuracy.run.items import item_id, statistic_of, to_item
from flexgen_bench.core.accuracy import Item
from flexgen_bench.core.errors import UserError

# Code points that are no characters.
_HALVES = re.compile("[\ud800-\udfff]")
# Of a task's score, between lm-eval's own aggregation and the sums of items.
_SAME_SCORE = 1e-6


@dataclass(frozen=True)
class Evaluated:
    """What a task left. scores: by metric, as lm-eval aggregates them (with the filter's name if there are several
    filters). left_out: items that cannot be scored, with the reason."""

    items: tuple[Item, ...]
    scores: dict[str, float | None]
    statistic: str
    higher_is_better: bool
    truncated: dict[str, int]
    left_out: dict[str, str]
    seconds: float


def evaluate_task(lm: Any, name: str, task: Any, metric: str, answers: Path) -> Evaluated:
    """Run a task. answers: where lm-eval's database of answers (its ``use_cache``) lies, written as each item is done,
    so that a run that was killed goes on where it stopped.

    Items that cannot be scored are found beforehand and left out. Raises UserError if these are all, for a metric that
    the task does not have or whose score is no function of sums over items.
    """
    from lm_eval.api.model import CachingLM
    from lm_eval.evaluator import evaluate

    statistic = check_metric(name, task, metric)
    answers.parent.mkdir(parents=True, exist_ok=True)
    if hasattr(lm, "truncated"):
        lm.truncated = TruncationCount.next_to(answers)
    begin = time.perf_counter()
    with quiet():
        _seed(task)
        without = unscorable(lm, task)
        if len(without) == len(task.eval_docs):
            raise UserError(
                f"items of task {name}", len(without), "such as can be scored", f"The first: {without[0][1]}"
            )
        _seed(task)
        results = evaluate(
            CachingLM(lm, f"{answers}_rank0.db"),
            {name: task},
            bootstrap_iters=0,
            log_samples=True,
            samples=_others(name, task, without),
        )
    seconds = time.perf_counter() - begin
    assert results is not None, "rank 0 has results"
    (task_name,) = results["samples"]
    samples = results["samples"][task_name]
    kind = str(task.OUTPUT_TYPE)
    first = samples[0]["filter"]
    items = tuple(to_item(s, kind, metric, statistic) for s in samples if s["filter"] == first)
    scores = _scores(results["results"][task_name], first)
    _check_score(name, metric, scores[metric], items, statistic)
    higher = task.higher_is_better().get(metric, True)
    truncated = dict(getattr(lm, "truncated", {}))
    left_out = dict(without.values())
    return Evaluated(items, scores, statistic, bool(higher), truncated, left_out, seconds)


def unscorable(lm: Any, task: Any) -> dict[int, tuple[str, str]]:
    """Items of a task that ``lm`` cannot score: number -> (id, why). One of its texts cannot be, or its document is no
    text that can be logged."""
    task.build_all_requests(rank=lm.rank, world_size=lm.world_size)
    reasons: dict[int, tuple[str, str]] = {}
    for instance in task.instances:
        number = int(instance.doc_id)
        if number in reasons:
            continue
        why = lm.why_not(instance.request_type, instance.args) if hasattr(lm, "why_not") else ""
        text, readable = _logged(instance.doc)
        if not readable and not why:
            why = "its document holds half of a surrogate pair, which is no text"
        if why:
            digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()
            reasons[number] = (item_id(number, digest), why)
    return reasons


def _logged(document: Any) -> tuple[str, bool]:
    """What lm-eval hashes of a document, and whether it can."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)
    return text, not _HALVES.search(text)


def _others(name: str, task: Any, without: Collection[int]) -> dict[str, list[int]] | None:
    """What ``lm_eval.evaluate`` is told of the items to ask; None for all."""
    if not without:
        return None
    return {name: [number for number in range(len(task.eval_docs)) if number not in without]}


def _seed(task: Any) -> None:
    """As ``lm_eval.simple_evaluate`` does by default, so that its command line gives the same prompts. (That function
    itself lists all installed packages after every task, which takes longer than small ones.)"""
    import torch

    random.seed(0)
    np.random.seed(1234)
    torch.manual_seed(1234)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=1234)


class TruncationCount(Counter[str]):
    """How many items were cut, by kind of request, kept beside the answers: a run that goes on where one was killed
    only sees the items that are left, but all were counted before the first was answered."""

    def __init__(self, path: Path, counts: dict[str, int], known: bool) -> None:
        super().__init__(counts)
        self._path, self._known = path, known

    @staticmethod
    def next_to(answers: Path) -> TruncationCount:
        """The counts of an earlier attempt if it has left answers, otherwise none yet."""
        path = answers.with_name("truncated.json")
        known = any(answers.parent.glob(f"{answers.name}_rank*.db")) and path.is_file()
        counts = json.loads(path.read_text()) if known else {}
        if not known:
            path.write_text("{}")
        return TruncationCount(path, counts, known)

    def __setitem__(self, kind: str, count: int) -> None:
        if not self._known:
            super().__setitem__(kind, count)
            self._path.write_text(json.dumps(dict(self)))


def check_metric(name: str, task: Any, metric: str) -> str:
    """The statistic of a task's metric. Raises UserError if it has none: named before anything runs."""
    aggregations = task.aggregation()
    if metric not in aggregations:
        known = ", ".join(sorted(aggregations)) or "none at all"
        raise UserError(f"metric of task {name}", metric, f"one of its metrics ({known})")
    return statistic_of(name, metric, aggregations[metric])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval tells much about each task, all of it as warnings; its errors stay."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _scores(results: dict[str, Any], first: str) -> dict[str, float | None]:
    scores: dict[str, float | None] = {}
    for key, value in results.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        name = metric if kind == first else f"{metric} ({kind})"
        scores[name] = float(value) if math.isfinite(value) else None
    return scores


def _check_score(name: str, metric: str, reported: float | None, items: tuple[Item, ...], statistic: str) -> None:
    """What is compared must be what lm-eval reports."""
    own = score(np.array([item.parts for item in items], dtype=np.float64), statistic)
    same = reported is None and not math.isfinite(own)
    if reported is not None:
        same = math.isclose(own, reported, rel_tol=_SAME_SCORE, abs_tol=_SAME_SCORE)
    if not same:
        raise UserError(
            f"metric {metric} of task {name}",
            reported,
            f"what its items sum up to ({own:.6g})",
            "Its aggregation is not the one it is taken for; choose another primary metric.",
        )
