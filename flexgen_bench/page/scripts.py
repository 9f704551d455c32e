"""Data for a page that has no server: files of JavaScript, as a browser reads nothing else from beside a page on disk.

Every file calls one function of the page with one JSON document. Text is data all the way: it is quoted twice, holds
no sign beyond ASCII, and never stands in HTML.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import StoreError


def script(name: str, data: Any) -> str:
    """The text of a file that hands ``data`` to the page under ``name``. JSON.parse is twice as fast as the same
    document written as a literal."""
    document = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII alone
    quoted = document.replace("\\", "\\\\").replace("'", "\\'")
    return f"page.data({json.dumps(name)},'{quoted}');\n"


def write_text(path: Path, text: str) -> Path:
    """Whole or not at all. Raises StoreError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(text, encoding="utf-8", newline="\n")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}. Choose another folder.") from error
    return path
