"""A first look through the input: what it is, so that an output is not mixed up with another one's, how much, and in
which order to start it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flexgen_bench.batch.inputs import KINDS, Line, LineFiles, lines_of, object_of
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.shard import Shard
from flexgen_bench.requests.errors import RequestError

# A file of which none of so many lines is JSON is no JSONL.
_LOOKED_AT = 20
_BLOCK = 2**14  # lines that wait to be packed
# Prompts that begin with the same so many characters are likely to begin with the same tokens, which a job computes
# once per micro-batch; worth looking for where so many do.
_SAME_START, _ENOUGH = 256, 32
# Where it is looked for: of a line that says nothing of the length of its answer, it may be long.
_UNSTATED = 2**31 - 1

# What is kept of a line: 41 bytes.
_LINE = np.dtype(
    [
        ("position", "i8"),
        ("offset", "i8"),
        ("name", "u8"),  # hash of its custom_id, 0 if it has none
        ("start", "u4"),  # hash of how its prompt starts
        ("new", "i4"),  # most new tokens
        ("size", "i4"),  # of the line, in bytes
        ("file", "i4"),
        ("is_repeated", "?"),  # an earlier line has its custom_id
    ]
)
Lines = np.ndarray[Any, np.dtype[np.void]]


@dataclass(frozen=True)
class Scan:
    """files: name and SHA-256 of each input. positions: one more than the largest. own_lines: what is known of each
    line of this shard."""

    files: tuple[tuple[str, str], ...]
    positions: int
    own_lines: Lines

    @property
    def lines(self) -> int:
        """How many lines of this shard ask for something."""
        return len(self.own_lines)

    def order(self) -> Lines:
        """The lines in the order in which they are to start: those together whose answers may be equally long (a
        micro-batch runs until its longest answer has ended), which start alike, and whose prompts are alike in length.
        Long answers first: what is left at the end is short."""
        lines = self.own_lines
        _, same, counts = np.unique(lines["start"], return_inverse=True, return_counts=True)
        start = np.where(counts[same] >= _ENOUGH, lines["start"], 0)
        return lines[np.lexsort((lines["position"], -lines["size"], start, -lines["new"]))]


def scan(paths: Sequence[Path], column: str | None, shard: Shard) -> Scan:
    """Read all of the input once. UserError for a file that is not what its name says."""
    _check_jsonl(paths)
    packed: list[Lines] = []
    block: list[tuple[int, ...]] = []
    for line in lines_of(paths, column):
        block.append(_noted(line))
        if len(block) == _BLOCK:
            packed.append(np.array(block, dtype=_LINE))
            block = []
    packed.append(np.array(block, dtype=_LINE))
    every = np.concatenate(packed)
    del packed
    if not len(every):
        raise UserError("input", ", ".join(map(str, paths)), "a file with requests in it")
    _mark_repeated(every)
    files = tuple((path.name, _sha256(path)) for path in paths)
    return Scan(files, int(every["position"][-1]) + 1, every[shard.has(every["position"])])


def in_order(lines: Lines, paths: Sequence[Path], column: str | None) -> Iterator[Line]:
    """These lines, read again one by one where they lie. Rows of parquet files, which cannot be, come as they are."""
    files = LineFiles(paths)
    try:
        in_tables = []
        for row in lines:
            if row["offset"] < 0:
                in_tables.append(int(row["position"]))
            else:
                line = files.read(int(row["position"]), int(row["file"]), int(row["offset"]), int(row["size"]))
                yield replace(line, is_repeated=bool(row["is_repeated"]))
    finally:
        files.close()
    table_positions = np.sort(np.array(in_tables, dtype=np.int64))
    for line in lines_of(paths, column) if len(table_positions) else ():
        at = int(np.searchsorted(table_positions, line.position))
        if at < len(table_positions) and table_positions[at] == line.position:
            yield line


def _noted(line: Line) -> tuple[int, ...]:
    given: Mapping[str, Any] = {}
    if line.kind == "jsonl":
        try:
            given = object_of(line.raw)
        except RequestError:
            given = {}
    name, body = given.get("custom_id"), given.get("body", given)
    body = body if isinstance(body, Mapping) else {}
    new = body.get("max_completion_tokens") or body.get("max_tokens")
    stated = new if type(new) is int and 0 <= new < _UNSTATED else _UNSTATED
    own = _hash(name.encode(errors="surrogatepass"), 8) if isinstance(name, str) else 0
    size = len(line.raw) if isinstance(line.raw, Sized) else 0
    return line.position, line.offset, own, _hash(_start(line, body), 4), stated, size, line.file, False


def _start(line: Line, body: Mapping[str, Any]) -> bytes:
    """How the prompt of a line starts, whatever form it has."""
    if line.kind == "text":
        return bytes(line.raw[:_SAME_START])
    body = {"prompt": line.raw} if line.kind == "parquet" else body
    prompt, messages = body.get("prompt"), body.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[0], Mapping):
        prompt = messages[0].get("content")
    shown = prompt[:_SAME_START] if isinstance(prompt, str | list) else prompt
    return str(shown).encode(errors="surrogatepass")


def _hash(data: bytes, size: int) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=size).digest(), "little")


def _mark_repeated(every: Lines) -> None:
    """All but the first line of those with the same name."""
    order = np.lexsort((every["position"], every["name"]))
    names = every["name"][order]
    same = (names[1:] == names[:-1]) & (names[1:] != 0)
    every["is_repeated"][order[1:][same]] = True


def _check_jsonl(paths: Sequence[Path]) -> None:
    for path in paths:
        if KINDS[path.suffix.lower()] != "jsonl":
            continue
        for looked_at, line in enumerate(lines_of([path]), start=1):
            if line.raw.lstrip()[:1] in (b"{", b"["):
                break
            if looked_at == _LOOKED_AT:
                raise UserError(
                    "input",
                    str(path),
                    f"JSONL: none of its first {looked_at} lines begins a JSON object",
                    "Is it text? Name it .txt.",
                )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
