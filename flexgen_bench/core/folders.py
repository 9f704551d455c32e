"""Folders that the user names."""

from __future__ import annotations

import tempfile
from pathlib import Path

from flexgen_bench.core.errors import UserError


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
