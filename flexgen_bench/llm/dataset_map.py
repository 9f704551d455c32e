"""A column of a dataset answered row by row: ``LLM.map``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from flexgen_bench.core.errors import UserError, unknown_choice
from flexgen_bench.core.sampling_params import SamplingParams
from flexgen_bench.engine.outputs import GenerationRequest, Output
from flexgen_bench.engine.tokenization import TextTokenizer
from flexgen_bench.requests.chat_template import encode_chat

_KINDS = "a pandas.DataFrame, a datasets.Dataset, a pyarrow.Table, or a list of mappings"


class Answers(Protocol):
    """What of an ``LLM`` is needed here."""

    tokenizer: TextTokenizer

    def generate_requests(self, requests: Sequence[GenerationRequest]) -> list[Output]: ...


def map_column(llm: Answers, dataset: Any, column: str, params: SamplingParams | None, output: str, window: int) -> Any:
    """``dataset`` with a new column of answers; see ``LLM.map``."""
    if window < 1:
        raise UserError("window", window, "at least 1")
    rows, with_column = _opened(dataset, column, output)
    answers: list[str] = []
    for start in range(0, len(rows), window):
        part = [rows[i] for i in range(start, min(start + window, len(rows)))]
        requests = [
            GenerationRequest(_prompt(llm, row, f"{column}[{start + i}]"), params or SamplingParams(), start + i)
            for i, row in enumerate(part)
        ]
        answers += [answer.text for answer in llm.generate_requests(requests)]
    return with_column(answers)


def _prompt(llm: Answers, row: Any, field: str) -> str | list[int]:
    if isinstance(row, np.ndarray):  # what pandas makes of a list in a parquet file, also of one of messages
        row = row.tolist()
    is_conversation = isinstance(row, Sequence) and len(row) > 0 and isinstance(row[0], Mapping)
    return encode_chat(llm.tokenizer, row, field) if is_conversation else llm.tokenizer.encode(row, field)


def _opened(dataset: Any, column: str, output: str) -> tuple[Sequence[Any], Any]:
    """The values of a column, and what makes a dataset of the same kind with one more."""
    kind = f"{type(dataset).__module__.partition('.')[0]}.{type(dataset).__name__}"
    if kind == "pandas.DataFrame":
        _check(column, output, [str(name) for name in dataset.columns])
        return list(dataset[column]), lambda answers: dataset.assign(**{output: answers})
    if kind == "datasets.Dataset":
        _check(column, output, dataset.column_names)
        return dataset[column], lambda answers: dataset.add_column(output, answers)
    if kind == "pyarrow.Table":
        _check(column, output, dataset.column_names)
        return dataset[column].to_pylist(), lambda answers: dataset.append_column(output, [answers])
    if (
        not isinstance(dataset, Sequence)
        or isinstance(dataset, str)
        or not all(isinstance(r, Mapping) for r in dataset)
    ):
        raise UserError("dataset", type(dataset).__name__, _KINDS)
    for row in dataset:
        _check(column, output, [str(name) for name in row])
    return [row[column] for row in dataset], lambda answers: [
        {**row, output: answer} for row, answer in zip(dataset, answers, strict=True)
    ]


def _check(column: str, output: str, names: Sequence[str]) -> None:
    if column not in names:
        raise unknown_choice("column", column, names)
    if output in names:
        raise UserError("output", output, "a column that is not there yet", "Name another one: nothing is overwritten.")
