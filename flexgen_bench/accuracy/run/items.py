"""lm-eval's logged samples as items whose score is a function of sums."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from flexgen_bench.accuracy.compare.statistics import STATISTICS
from flexgen_bench.core.accuracy import LOGLIK_DECIMALS, Item
from flexgen_bench.core.errors import UserError

# What lm-eval calls an aggregation -> the statistic of ``accuracy.statistics`` that it is.
_STATISTIC_OF = {
    "mean": "mean",
    "nanmean": "mean",
    "perplexity": "exp_ratio",
    "weighted_perplexity": "exp_ratio",
    "bits_per_byte": "bits",
    "f1_score": "f1",
}


def statistic_of(task: str, metric: str, aggregation: Any) -> str:
    """The statistic that an lm-eval aggregation is. Raises UserError for one that is no function of sums over items.

    A task's own aggregation says which it is by an attribute ``statistic``.
    """
    own = getattr(aggregation, "statistic", None)
    name = own or _STATISTIC_OF.get(getattr(aggregation, "__name__", str(aggregation)))
    if name not in STATISTICS:
        raise UserError(
            f"metric {metric} of task {task}",
            getattr(aggregation, "__name__", str(aggregation)),
            f"aggregated by one of {', '.join(_STATISTIC_OF)}",
            "Choose another primary metric: items must be comparable one by one.",
        )
    return str(name)


def item_id(number: int, digest: str) -> str:
    """An item by its number and the beginning of the hash that lm-eval logs of its document."""
    return f"{number}-{digest[:12]}"


def to_item(sample: Mapping[str, Any], kind: str, metric: str, statistic: str) -> Item:
    """One logged sample. kind: the task's output type. Raises UserError for a metric value of a shape nobody knows."""
    arguments = [tuple(a) for a in sample["arguments"]]
    parts = _parts(sample[metric], metric, statistic)
    loglik, texts, gold = _scored(sample, kind, arguments)
    document = sample["doc"] if isinstance(sample["doc"], Mapping) else {}
    return Item(
        id=item_id(sample["doc_id"], str(sample["doc_hash"])),
        cluster=str(document.get("subject") or ""),
        parts=parts,
        prediction=_prediction(sample, kind, metric, loglik, texts),
        correct=bool(parts[0]) if statistic == "mean" and parts[0] in (0.0, 1.0) else None,
        loglik=tuple(round(value, LOGLIK_DECIMALS) for value in loglik),
        bytes=tuple(len(text.encode("utf-8")) for text in texts),
        gold=gold,
    )


def _parts(value: Any, metric: str, statistic: str) -> tuple[float, ...]:
    """The addends of an item's score."""
    if statistic == "f1":
        gold, predicted = (bool(v) for v in value)
        return (float(gold and predicted), float(predicted and not gold), float(gold and not predicted))
    if isinstance(value, tuple | list) and len(value) == 2 and statistic in ("exp_ratio", "bits"):
        return -float(value[0]), float(value[1])
    if isinstance(value, bool | int | float) or hasattr(value, "item"):
        number = float(value)
        return (-number if statistic == "exp_ratio" else number), 1.0
    raise UserError(f"metric {metric}", value, f"a number, or what {statistic} sums over items")


def _scored(
    sample: Mapping[str, Any], kind: str, arguments: Sequence[tuple[Any, ...]]
) -> tuple[list[float], list[str], int | None]:
    """Log-likelihoods, the texts they are of, and which is the right one."""
    responses = sample["filtered_resps"]
    if kind == "loglikelihood_rolling":
        return [float(responses[0])], [str(arguments[0][0])], 0
    if kind == "loglikelihood":
        return [float(responses[0][0])], [str(arguments[0][1])], 0
    if kind != "multiple_choice":
        return [], [], None
    texts = [str(a[1]) for a in arguments]
    target = sample["target"]
    gold = next(iter(target), None) if isinstance(target, list | tuple) else target
    if isinstance(gold, str):
        stripped = [text.strip() for text in texts]
        gold = stripped.index(gold.strip()) if gold.strip() in stripped else None
    index = int(gold) if gold is not None and 0 <= int(gold) < len(texts) else None
    return [float(answer[0]) for answer in responses], texts, index


def _prediction(
    sample: Mapping[str, Any], kind: str, metric: str, loglik: Sequence[float], texts: Sequence[str]
) -> str:
    """The choice by the rule of the metric, whether the text is what greedy decoding gives, or the generated text."""
    if kind == "multiple_choice":
        lengths = {
            "acc_norm": [len(text.strip()) for text in texts],
            "acc_bytes": [len(text.strip().encode("utf-8")) for text in texts],
        }.get(metric, [1] * len(texts))
        values = [
            value / max(n, 1) if math.isfinite(value) else -math.inf for value, n in zip(loglik, lengths, strict=True)
        ]
        return str(values.index(max(values)))
    if kind == "loglikelihood":
        return "greedy" if sample["filtered_resps"][0][1] else "other"
    if kind == "loglikelihood_rolling":
        return ""
    return _text(sample["filtered_resps"][0])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)
