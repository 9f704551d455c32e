"""Folders and files that the user names."""

from __future__ import annotations

import argparse
import errno
import tempfile
from pathlib import Path

from flexgen_bench.core.errors import UserError


def is_gguf(path: str | Path) -> bool:
    """Whether a path is that of a GGUF file, by its ending in any case."""
    return Path(path).suffix.lower() == ".gguf"


def expanded(name: str | Path, field: str) -> Path:
    """A path with ``~`` as the home folder it stands for; UserError naming ``field`` if nobody has it, or no file can
    be called so."""
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(
            field, str(name), "a path whose ~ is somebody's home folder", "For a folder that is called so, write ./~..."
        ) from error
    try:
        path.lstat()
    except (OSError, ValueError) as error:
        impossible = isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG
        if impossible:
            raise UserError(field, str(name), f"a path that can be ({error})") from error
    return path


def path_argument(name: str) -> Path:
    """A path on the command line of an ``argparse`` parser: the shell leaves the ``~`` of ``--out=~/x`` to the
    program."""
    try:
        return expanded(name, "path")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def make_writable(directory: Path, field: str) -> Path:
    """The directory, created if missing; UserError naming ``field`` if nothing can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(field, str(directory), f"a writable directory ({error.strerror})", "Choose another.") from error
    return directory
