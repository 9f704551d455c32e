"""Rows of a task as they lie in the cache: their order, their file, their hash."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import StoreError

Row = Mapping[str, Any]
# Split -> rows, in the order in which they are evaluated.
Rows = Mapping[str, Sequence[Row]]


def ordered(rows: Iterable[Row]) -> list[Row]:
    """The rows in the order of the SHA-256 of their own text, each once.

    It depends on nothing but the rows, mixes what a data set keeps together (subjects, labels), and the first N of it
    are the same sample everywhere: ``--limit N`` of lm-eval takes them.
    """
    by_hash = {hashlib.sha256(_line(row).encode("utf-8")).hexdigest(): row for row in rows}
    return [by_hash[key] for key in sorted(by_hash)]


def split_off(rows: Sequence[Row], examples: int) -> Rows:
    """Rows that come without a training split: the first ``examples`` are shown in prompts and never asked."""
    return {"fewshot": rows[:examples], "test": rows[examples:]} if examples else {"test": rows}


def to_text(rows: Iterable[Row]) -> str:
    """One JSON object a line."""
    return "".join(f"{_line(row)}\n" for row in rows)


def text_hash(text: str) -> str:
    """SHA-256 of the text that ``to_text`` gives. Of the text, not of the compressed file, which depends on zlib."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def write_rows(path: Path, rows: Iterable[Row]) -> str:
    """Write rows, complete or not at all; their hash."""
    text = to_text(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(gzip.compress(text.encode("utf-8"), mtime=0))
    part.replace(path)
    return text_hash(text)


@lru_cache(maxsize=4)
def read_rows(path: Path, sha256: str) -> tuple[Row, ...]:
    """Rows that ``write_rows`` wrote. Raises StoreError if the file is missing, damaged, or holds other rows."""
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
    except FileNotFoundError:
        raise StoreError(f"no data at {path}. Fetch it: python -m flexgen_bench fetch accuracy") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise StoreError(
            f"{path} is damaged ({error}). Delete it and fetch it again: python -m flexgen_bench fetch accuracy"
        ) from error
    digest = text_hash(text)
    if digest != sha256:
        raise StoreError(
            f"{path} holds rows of SHA-256 {digest}, the task was written for {sha256}. Numbers would not be "
            "comparable. "
            "Fetch it again: python -m flexgen_bench fetch accuracy"
        )
    return tuple(json.loads(line) for line in text.splitlines())


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=True, sort_keys=True)
