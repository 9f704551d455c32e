"""Texts that are made anew again and again, such as pages: written whole, over what was there."""

from __future__ import annotations

from pathlib import Path

from flexgen_bench.core.errors import StoreError


def write_text(path: Path, text: str, remedy: str = "") -> Path:
    """Whole or not at all: a page cut short by a full disk must not replace a good one.

    Raises StoreError, which ends with ``remedy``, if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Half of a character (a surrogate), such as of a path that is no text, as its escape.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        told = f"cannot write {path}: {error.strerror or error}"
        raise StoreError(f"{told}. {remedy}" if remedy else told) from error
    return path
