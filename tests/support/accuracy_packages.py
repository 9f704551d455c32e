"""Small packages with data, made where they are needed, in the forms in which the real ones carry it."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest


def put(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return folder


def arrow(rows: list[dict[str, Any]]) -> bytes:
    pa = pytest.importorskip("pyarrow")
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def requests(docs: list[dict[str, Any]]) -> bytes:
    lines = []
    for number, doc in enumerate(docs):
        # Each choice is a request of the same document, and each has a copy that normalises scores.
        lines += [{"doc_id": number, "doc": doc}, {"doc_id": number, "doc": doc}]
        lines += [{"doc_id": number + 1_000_000, "doc": {**doc, "query": "Answer:"}}]
    return gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())


def bigbench(*examples: Mapping[str, Any]) -> str:
    return json.dumps({"canary": "x", "examples": list(examples)})
