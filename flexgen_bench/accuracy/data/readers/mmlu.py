"""MMLU: each question carries the worked examples of its own subject."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from flexgen_bench.accuracy.data.readers.arrow import stream
from flexgen_bench.accuracy.data.rows import Rows, ordered


def read(folder: Path, *, shots: int = 5) -> Rows:
    """All subjects' test questions, mixed. ``shots``: the text of the subject's first ``shots`` questions of its dev
    split, answered.

    lm-eval draws examples of one task from one pool; subjects have their own here, as in HELM and in the original, so
    they are part of the row. Their form is the original's (Hendrycks et al. 2021), instruction included.
    """
    heads: dict[str, str] = {}
    tests = []
    for path in sorted(p for p in folder.rglob("*") if p.name in ("dev", "test") and p.is_dir()):
        subject = path.parent.name
        rows = list(stream(path))
        if path.name == "dev":
            title = subject.replace("_", " ")
            shown = "".join(f"{_question(r['question'], r['choices'])} {'ABCD'[r['answer']]}\n\n" for r in rows[:shots])
            heads[subject] = f"The following are multiple choice questions (with answers) about {title}.\n\n{shown}"
        else:
            tests += [(subject, row) for row in rows]
    by_subject: dict[str, list[dict[str, object]]] = defaultdict(list)
    for subject, row in tests:
        by_subject[subject].append(
            {
                "subject": subject,
                "shots": heads[subject],
                "question": row["question"].strip(),
                "choices": row["choices"],
                "answer": row["answer"],
            }
        )
    return {"test": ordered(row for subject in sorted(by_subject) for row in by_subject[subject])}


def _question(question: str, choices: list[str]) -> str:
    listed = "".join(f"{letter}. {text}\n" for letter, text in zip("ABCD", choices, strict=True))
    return f"{question.strip()}\n{listed}Answer:"
