"""Everything that pictures are made of, read from a results folder. What cannot be used is named and hides nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_bench.accuracy.compare.compare import Margins
from flexgen_bench.accuracy.compare.outcome import ModelOutcome, outcomes
from flexgen_bench.core.errors import UserError
from flexgen_bench.pictures.from_prediction import run_of_prediction
from flexgen_bench.pictures.from_record import run_of_record
from flexgen_bench.pictures.run import Run
from flexgen_bench.report.usable import what_is_odd
from flexgen_bench.store.accuracy_store import read_accuracy
from flexgen_bench.store.reader import Problem, StoredRecord, read_all


@dataclass(frozen=True)
class Material:
    """runs: records, then predictions; problems: files that could not be used, and why."""

    runs: tuple[Run, ...] = ()
    accuracy: tuple[ModelOutcome, ...] = ()
    problems: tuple[Problem, ...] = ()


def gather(results_dir: Path, predictions: Sequence[Path] = (), prices: Mapping[str, float] | None = None) -> Material:
    """Of every cell in every suite the newest record, records of accuracy, and what these files predict.

    predictions: what ``python -m flexgen_bench ... json=true`` prints. prices: USD per hour by the name of the
    hardware, where the record states none or another one. Raises UserError for a folder that does not exist and for a
    file that holds no predictions, StoreError for a folder that cannot be listed.
    """
    if not results_dir.is_dir():
        action = "Measure something first: python -m flexgen_bench"
        raise UserError("results_dir", str(results_dir), "an existing folder of records", action)

    def odd(stored: StoredRecord) -> str:
        return what_is_odd(stored, lambda _: run_of_record(stored, results_dir, prices or {}))

    records, problems = read_all(results_dir, odd)
    stored = read_accuracy(results_dir)
    predicted = [row for path in predictions for row in _predicted(path, prices or {})]
    return material(
        records, outcomes(stored, Margins()), [*problems, *stored.problems], results_dir, prices, predicted=predicted
    )


def material(
    records: Iterable[StoredRecord],
    accuracy: Sequence[ModelOutcome],
    problems: Sequence[Problem],
    results_dir: Path,
    prices: Mapping[str, float] | None = None,
    *,
    predicted: Sequence[Run] = (),
) -> Material:
    """The same of what was read already."""
    runs, unusable = [], []
    for stored in records:
        try:
            runs.append(run_of_record(stored, results_dir, prices or {}))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
            why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            unusable.append(Problem(stored.path, f"{stored.path} has a spec that no picture can be made of ({why})"))
    return Material((*runs, *predicted), tuple(accuracy), (*problems, *unusable))


def _predicted(path: Path, prices: Mapping[str, float]) -> list[Run]:
    """The rows of the last line that is a document: what a command printed before it is passed over."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--predictions", str(path), f"a readable file ({error})") from error
    try:
        document: Any = json.loads(text.strip().splitlines()[-1])
        return [run_of_prediction(row, path.name, prices) for row in document["simulated"]]
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        action = "Make it with: python -m flexgen_bench model=X gpu=Y json=true > FILE"
        allowed = f"a file whose last line holds predictions ({type(error).__name__}: {error})"
        raise UserError("--predictions", str(path), allowed, action) from error
