"""Files of requests, read line by line: JSONL in OpenAI's batch format or of bare prompts, plain text, parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import CannotRun, UserError, unknown_choice
from flexgen_bench.core.extras import how_to_install
from flexgen_bench.requests.errors import RequestError
from flexgen_bench.requests.forms import CHAT, COMPLETIONS, FORMS

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".parquet": "parquet"}
_ROWS = 1024  # of a parquet file that are in memory at once


@dataclass(frozen=True)
class Line:
    """One line (or row) of the input that asks for something. position: its number over all files, from 0, blank lines
    counted. file, offset: where it lies; offset is -1 for a row of a table."""

    position: int
    raw: bytes | str
    kind: str
    file: int = 0
    offset: int = -1


@dataclass(frozen=True)
class LineRequest:
    """What a line asks for. custom_id: the caller's own name for it; None where the line gives none."""

    custom_id: str | None
    url: str
    body: dict[str, Any]


def check_inputs(paths: Sequence[Path], column: str | None) -> None:
    """UserError for a file that is not there or of no known kind, CannotRun where what reads it is not installed."""
    for path in paths:
        if path.suffix.lower() not in KINDS:
            raise UserError("input", str(path), f"a file that ends in one of {', '.join(KINDS)}")
        if not path.is_file():
            raise UserError("input", str(path), "a file that exists")
    tables = [path for path in paths if _kind(path) == "parquet"]
    if tables and column is None:
        names = _parquet(tables[0]).schema_arrow.names
        raise UserError("--column", None, "named for a parquet file", f"{tables[0]} has {', '.join(names)}.")
    if column is not None and not tables:
        raise UserError("--column", column, "given with a parquet file alone")
    for path in tables:
        names = _parquet(path).schema_arrow.names
        if column not in names:
            raise unknown_choice("--column", str(column), names)


def lines_of(paths: Sequence[Path], column: str | None = None) -> Iterator[Line]:
    """Every line that is not blank, one after the other; nothing but the one that is read is in memory."""
    position = 0
    for number, path in enumerate(paths):
        kind = _kind(path)
        if kind == "parquet":
            for row in _rows(path, column):
                yield Line(position, row, kind, number)
                position += 1
            continue
        offset = 0
        with path.open("rb") as file:
            for raw in file:
                if raw.strip():
                    yield Line(position, raw, kind, number, offset)
                offset += len(raw)
                position += 1


class LineFiles:
    """Reads single lines of text files, by where they lie."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._kinds = [_kind(path) for path in paths]
        self._files = [None if _kind(path) == "parquet" else path.open("rb") for path in paths]

    def read(self, position: int, file: int, offset: int) -> Line:
        opened = self._files[file]
        assert opened is not None, "rows of tables are read in order"
        opened.seek(offset)
        return Line(position, opened.readline(), self._kinds[file], file, offset)

    def close(self) -> None:
        for file in self._files:
            if file is not None:
                file.close()


def request_of(line: Line, model: str, defaults: dict[str, Any]) -> LineRequest:
    """What a line asks for. model, defaults: of a line that is a bare prompt. RequestError for one that asks for
    nothing."""
    if line.kind == "text":
        return LineRequest(None, COMPLETIONS, {"model": model, "prompt": _decoded(line.raw), **defaults})
    if line.kind == "parquet":
        return LineRequest(None, COMPLETIONS, {"model": model, "prompt": _decoded(line.raw), **defaults})
    given = object_of(line.raw)
    custom_id = given.get("custom_id")
    if custom_id is not None and not isinstance(custom_id, str):
        raise RequestError(f"custom_id = {custom_id!r}: must be text.", "custom_id", "invalid_value")
    if "body" not in given and "url" not in given:
        body = {"model": model, **defaults, **{k: v for k, v in given.items() if k != "custom_id"}}
        if ("prompt" in given) == ("messages" in given):
            raise RequestError("The line has neither body and url nor a prompt or messages.", "body", "invalid_line")
        return LineRequest(custom_id, COMPLETIONS if "prompt" in given else CHAT, body)
    return _openai_line(given, custom_id)


def custom_id_of(line: Line) -> str | None:
    """The name that a line gives itself, however wrong the rest of it is."""
    try:
        custom_id = object_of(line.raw).get("custom_id") if line.kind == "jsonl" else None
    except RequestError:
        return None
    return custom_id if isinstance(custom_id, str) else None


def _openai_line(given: dict[str, Any], custom_id: str | None) -> LineRequest:
    others = sorted(set(given) - {"custom_id", "method", "url", "body"})
    if others:
        raise RequestError(f"{others[0]} is not a field of a batch's line.", others[0], "unknown_parameter")
    if custom_id is None:
        raise RequestError("custom_id is missing.", "custom_id", "missing_required_parameter")
    if given.get("method", "POST") != "POST":
        raise RequestError(f"method = {given['method']!r}: must be 'POST'.", "method", "invalid_value")
    url, body = given.get("url"), given.get("body")
    if url not in FORMS:
        raise RequestError(f"url = {url!r}: must be one of {', '.join(FORMS)}.", "url", "invalid_url")
    if not isinstance(body, dict):
        raise RequestError("body must be a JSON object.", "body", "invalid_value")
    if body.get("stream"):
        raise RequestError("stream = true: a line of a batch is answered as a whole.", "stream", "invalid_value")
    return LineRequest(custom_id, str(url), body)


def object_of(raw: bytes | str) -> dict[str, Any]:
    """The JSON object of a line; RequestError for what is none."""
    try:
        parsed = json.loads(_decoded(raw))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The line is no JSON: {error}.", None, "invalid_json_line") from error
    if not isinstance(parsed, dict):
        raise RequestError(f"The line is {type(parsed).__name__}, not a JSON object.", None, "invalid_json_line")
    return parsed


def _decoded(raw: bytes | str) -> str:
    if isinstance(raw, str):
        return raw
    try:
        return raw.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"The line is no UTF-8: {error.reason} at byte {error.start}.", None, "invalid_line"
        ) from error


def _rows(path: Path, column: str | None) -> Iterator[str]:
    """The texts of a column; a row that is null is an empty prompt."""
    for batch in _parquet(path).iter_batches(batch_size=_ROWS, columns=[column]):
        for value in batch.column(0).to_pylist():
            yield "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise CannotRun(f"Parquet: {how_to_install('pyarrow')}") from error
    try:
        return ParquetFile(path)
    except ArrowInvalid as error:
        raise UserError("input", str(path), f"a parquet file ({error})") from error


def _kind(path: Path) -> str:
    return KINDS[path.suffix.lower()]
