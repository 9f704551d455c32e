"""Texts that are made anew again and again, such as pages: written whole, over what was there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from flexgen_bench.core.errors import StoreError

# Of a file beside the one that is meant: none may be made in its folder, none may take its place (it is mounted), or
# its longer name is none.
_NO_NEIGHBOUR = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.ENAMETOOLONG)


def write_text(path: Path, text: str, remedy: str = "") -> Path:
    """Whole or not at all: a page cut short by a full disk must not replace a good one.

    Links stay, and the file that they name is written. What is no regular file (a device, a pipe), or lies where no
    other file can be made, is written to as it is. Raises StoreError, which ends with ``remedy``, if it cannot be
    written.
    """
    # Half of a character (a surrogate), such as of a path that is no text, as its escape.
    content = text.encode("utf-8", errors="backslashreplace")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
        else:
            _write_file(Path(os.path.realpath(path)), content)
    except OSError as error:
        told = f"cannot write {path}: {error.strerror or error}"
        raise StoreError(f"{told}. {remedy}" if remedy else told) from error
    return path


def _write_file(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            if os.path.lexists(temporary):
                temporary.unlink()
    except OSError as error:
        if error.errno not in _NO_NEIGHBOUR:
            raise
        path.write_bytes(content)
