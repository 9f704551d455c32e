"""Accuracy records made by hand, for tests of what reads them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from flexgen_bench.core.accuracy import Item, ModeRecord, Subject, TaskRecord
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import EXACT, Compression, Lossy

TIME = "2026-11-22T20:00:00+00:00"
W4 = Lossy(weights=Compression(4))
LOSSY = {"exact": EXACT, "w4": W4, "w3": Lossy(weights=Compression(3)), "w8": Lossy(weights=Compression(8))}


def subject(mode: str = "exact", **changes: Any) -> Subject:
    values: dict[str, Any] = {
        "model": "tiny",
        "fingerprint": "f" * 16,
        "system": "flexgen",
        "mode": mode,
        "lossy": to_json(LOSSY.get(mode, W4)),
        "dtype": "float32",
        "run_dtype": "float32",
    }
    return Subject(**(values | changes))


def choice_item(number: int, right: bool, loss: float = 1.0, cluster: str = "") -> Item:
    """A question of two choices whose first is right."""
    loglik = (-loss, -loss - 1) if right else (-loss, -loss + 0.5)
    return Item(
        id=f"{number}-abc",
        cluster=cluster,
        parts=(float(right), 1.0),
        prediction="0" if right else "1",
        correct=right,
        loglik=loglik,
        bytes=(4, 4),
        gold=0,
    )


def choice_items(
    n: int, accuracy: float, seed: int = 0, flip: Sequence[int] = (), extra_loss: float = 0.0
) -> list[Item]:
    """The same questions for one seed; those in ``flip`` are answered the other way."""
    rng = random.Random(seed)
    items = []
    for i in range(n):
        right, loss = rng.random() < accuracy, 1 + rng.random()
        items.append(choice_item(i, right ^ (i in flip), loss + extra_loss * (0.5 + rng.random())))
    return items


def text_items(n: int, extra_loss: float = 0.0, seed: int = 1) -> list[Item]:
    """Rolling log-likelihoods of texts of 100 bytes and 20 words."""
    rng = random.Random(seed)
    items = []
    for i in range(n):
        loss = 60 + 10 * rng.random() + extra_loss * (0.5 + rng.random())
        items.append(
            Item(
                id=f"{i}-text",
                cluster="",
                parts=(loss, 20.0),
                prediction="",
                correct=None,
                loglik=(-loss,),
                bytes=(100,),
                gold=0,
            )
        )
    return items


def task_record(items: Sequence[Item], mode: str = "exact", task: str = "quiz", **changes: Any) -> TaskRecord:
    values: dict[str, Any] = {
        "run_id": f"run-{task}-{mode}",
        "key": f"key{task}{mode}".ljust(16, "0"),
        "subject": subject(mode),
        "task": task,
        "task_version": "1",
        "data_sha256": {"data": "0" * 64},
        "metric": "acc",
        "statistic": "mean",
        "higher_is_better": True,
        "limit": None,
        "truncated": {},
        "left_out": {},
        "scores": {"acc": 0.5},
        "items": tuple(items),
        "started_utc": TIME,
        "ended_utc": TIME,
        "seconds": 1.0,
        "rerun_command": f"python -m flexgen_bench accuracy model=tiny tasks={task} mode={mode}",
    }
    return TaskRecord(**(values | changes))


def perplexity_record(items: Sequence[Item], mode: str = "exact", **changes: Any) -> TaskRecord:
    words: dict[str, Any] = {
        "metric": "word_perplexity",
        "statistic": "exp_ratio",
        "higher_is_better": False,
        "task": "novel",
        "scores": {"word_perplexity": 20.0},
    }
    return task_record(items, mode, **(words | changes))


def mode_record(mode: str = "w4", **changes: Any) -> ModeRecord:
    values: dict[str, Any] = {
        "run_id": f"run-mode-{mode}",
        "key": f"mode{mode}".ljust(16, "0"),
        "subject": subject(mode),
        "weight_bytes": 563,
        "weight_values": 1000,
        "weights": (),
        "grid_error": None,
        "kv": (),
        "divergence": (),
        "started_utc": TIME,
        "ended_utc": TIME,
        "rerun_command": "",
    }
    return ModeRecord(**(values | changes))
