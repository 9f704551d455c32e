"""Files of requests, read line by line: JSONL in OpenAI's batch format or of bare prompts, plain text, parquet."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flexgen_bench.core.errors import CannotRun, UserError, unknown_choice
from flexgen_bench.core.extras import how_to_install
from flexgen_bench.requests.errors import RequestError
from flexgen_bench.requests.forms import CHAT, COMPLETIONS, FORMS

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "text", ".parquet": "parquet"}
# Bytes of a line; a longer one is refused, and read no further than this. A prompt of a million tokens is a tenth.
MOST_LINE = 64 * 2**20
_ROWS = 1024  # of a parquet file that are in memory at once
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")


@dataclass(frozen=True)
class Line:
    """One line (or row) of the input that asks for something. position: its number over all files, from 0, blank lines
    counted. raw: bytes of a line; the value of a row. file, offset: where it lies; offset is -1 for a row of a table.
    is_repeated: whether an earlier line has its custom_id (``Scan`` knows)."""

    position: int
    raw: Any
    kind: str
    file: int = 0
    offset: int = -1
    is_repeated: bool = False


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
            action = "Unpack it first." if path.suffix.lower() in _PACKED else ""
            action = "Write it to a file first: it is read more than once." if _is_pipe(path) else action
            raise UserError("input", str(path), f"a file that ends in one of {', '.join(KINDS)}", action)
        if not path.is_file():
            raise UserError("input", str(path), "a file that exists")
        try:
            path.open("rb").close()
        except OSError as error:
            raise UserError("input", str(path), f"a file that can be read ({error.strerror})") from error
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
        with path.open("rb") as file:
            for offset, raw in _text_lines(file):
                if raw.strip():
                    yield Line(position, raw, kind, number, offset)
                position += 1


def _text_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Where every line begins, and its bytes: of one that is too long, only so many that this is seen. The mark that
    some editors write at the beginning of a file is not part of its first line."""
    offset = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
    file.seek(offset)
    while raw := file.readline(MOST_LINE + 1):
        yield offset, raw
        offset += len(raw)
        while len(raw) > MOST_LINE and not raw.endswith(b"\n"):
            raw = file.readline(MOST_LINE + 1)
            offset += len(raw)


class LineFiles:
    """Reads single lines of text files, by where they lie."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._kinds = [_kind(path) for path in paths]
        self._files = [None if _kind(path) == "parquet" else path.open("rb") for path in paths]

    def read(self, position: int, file: int, offset: int, size: int) -> Line:
        """size: of the line when it was seen first. UserError if it is not that any more."""
        opened = self._files[file]
        assert opened is not None, "rows of tables are read in order"
        opened.seek(offset)
        raw = opened.readline(MOST_LINE + 1)
        if len(raw) != size:
            raise UserError(
                "input",
                opened.name,
                "left as it is while it is answered",
                f"Its line {position} (from 0) is another one now. Restore the file, or name a new output.",
            )
        return Line(position, raw, self._kinds[file], file, offset)

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
        is_chat = isinstance(line.raw, list) and len(line.raw) > 0 and isinstance(line.raw[0], Mapping)
        field, url = ("messages", CHAT) if is_chat else ("prompt", COMPLETIONS)
        return LineRequest(None, url, {"model": model, field: line.raw, **defaults})
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


def object_of(raw: bytes) -> dict[str, Any]:
    """The JSON object of a line; RequestError for what is none."""
    text = _decoded(raw)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The line is no JSON: {error}.", None, "invalid_json_line") from error
    if not isinstance(parsed, dict):
        raise RequestError(f"The line is {type(parsed).__name__}, not a JSON object.", None, "invalid_json_line")
    return parsed


def _decoded(raw: bytes) -> str:
    if len(raw) > MOST_LINE:
        raise RequestError(f"The line is longer than {MOST_LINE} bytes.", None, "line_too_long")
    try:
        return raw.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"The line is no UTF-8: {error.reason} at byte {error.start}.", None, "invalid_line"
        ) from error


def _rows(path: Path, column: str | None) -> Iterator[Any]:
    """The values of a column: texts, lists of token ids, conversations (or what none of these is: its request is
    refused)."""
    table = _parquet(path)
    import pyarrow

    try:
        for batch in table.iter_batches(batch_size=_ROWS, columns=[column]):
            for value in batch.column(0).to_pylist():
                # A struct has every field that any row has, those that a row has not as null.
                is_chat = isinstance(value, list) and all(isinstance(part, Mapping) for part in value)
                yield [{k: v for k, v in part.items() if v is not None} for part in value] if is_chat else value
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # damaged behind its head; text that is no UTF-8
        raise UserError(
            "input", str(path), f"a parquet file whose column {column} can be read ({error})", "Write it anew."
        ) from error


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise CannotRun(f"Parquet: {how_to_install('pyarrow')}") from error
    try:
        return ParquetFile(path)
    except (ArrowInvalid, OSError) as error:
        raise UserError("input", str(path), f"a parquet file ({error})") from error


def _is_pipe(path: Path) -> bool:
    return str(path) == "-" or path.is_fifo() or path.is_char_device()


def _kind(path: Path) -> str:
    return KINDS[path.suffix.lower()]
