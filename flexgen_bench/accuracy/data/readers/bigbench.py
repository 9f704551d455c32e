"""Tasks of the ``bigbench`` package. Its texts carry a canary: evaluate with them, never train on them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexgen_bench.accuracy.data.rows import Rows, ordered, split_off

_COMMENT = "#"


def choices(folder: Path, *, examples: int = 0, strip_suffix: str = "", strip_to: str = "") -> Rows:
    """``input``, ``choices`` in alphabetical order (a file lists the right one first), and which is right.

    strip_suffix: cut off the end of an input. strip_to: cut off what comes before, that text included.
    """
    rows = []
    for doc in _examples(folder):
        text = doc["input"].removesuffix(strip_suffix)
        if strip_to:
            text = text.partition(strip_to)[2] or text
        rows.append({"input": text.strip(), **_scored(doc)})
    return split_off(ordered(rows), examples)


def bbq(folder: Path, *, examples: int = 0) -> Rows:
    """BBQ-lite: the context, the question, three answers, the right one; ``condition``: whether the context settles
    it."""
    rows = []
    for doc in _examples(folder):
        context, _, question = doc["input"].rpartition(". ")
        about = doc["comment"]
        rows.append(
            {
                "subject": str(about["category"]),
                "condition": str(about["context_condition"]),
                "context": f"{context}.",
                "question": question,
                **_scored(doc),
            }
        )
    return split_off(ordered(rows), examples)


def xsum(folder: Path, *, shortest: int, longest: int, example_longest: int, examples: int = 0) -> Rows:
    """XSUM: articles of ``shortest`` to ``longest`` characters and their one-sentence summaries."""
    pairs = [(doc["input"], doc["target"]) for doc in _examples(folder)]
    return _summaries(pairs, shortest, longest, example_longest, examples)


def cnn_dm(folder: Path, *, shortest: int, longest: int, example_longest: int, examples: int = 0) -> Rows:
    """CNN/DailyMail: articles and their highlights, one a line."""
    pairs = []
    for path in sorted(folder.rglob("cnn_dm.json")):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line and not line.startswith(_COMMENT):
                doc = json.loads(line)
                pairs.append((doc["source"], doc["true_cnd"]))
    return _summaries(pairs, shortest, longest, example_longest, examples)


def _summaries(
    pairs: Sequence[tuple[str, str]], shortest: int, longest: int, example_longest: int, examples: int
) -> Rows:
    rows = ordered(
        {"article": article.strip(), "summary": summary.strip()}
        for article, summary in pairs
        if shortest <= len(article.strip()) <= longest
    )
    # Examples are the first short ones: every prompt carries them.
    shown = [row for row in rows if len(row["article"]) <= example_longest][:examples]
    tested = [row for row in rows if row not in shown]
    return {"fewshot": shown, "test": tested} if examples else {"test": tested}


def _examples(folder: Path) -> Iterator[Mapping[str, Any]]:
    for path in sorted(folder.rglob("*.json")):
        yield from json.loads(path.read_text(encoding="utf-8")).get("examples", [])


def _scored(doc: Mapping[str, Any]) -> dict[str, Any]:
    scores = doc["target_scores"]
    listed = sorted(scores)
    return {"choices": listed, "gold": listed.index(max(listed, key=lambda c: scores[c]))}
