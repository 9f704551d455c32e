"""Folders and files that the user names."""

from __future__ import annotations

import tempfile
from pathlib import Path

from flexgen_bench.core.errors import UserError


def is_gguf(path: str | Path) -> bool:
    """Whether a path is that of a GGUF file, by its ending in any case."""
    return Path(path).suffix.lower() == ".gguf"


def make_writable(directory: Path, field: str) -> Path:
    """The directory, created if missing; UserError naming ``field`` if nothing can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            field, str(directory), f"a writable directory ({error.strerror})", "Choose another."
        ) from error
    return directory
