"""Writing a record: whole or not at all, and never over another one."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.record import Record
from flexgen_bench.store.schema import decode, encode, parse

# Records of cells that were asked for one by one, outside any suite.
NO_SUITE = "single"
# A name made of five parts must stay below the 255 bytes that file systems allow.
_LONGEST_PART = 44


def write_record(record: Record, results_dir: Path) -> Path:
    """Write ``record`` under ``results_dir`` and return its path; a rerun adds a file beside the older ones.

    The file appears under its name only when its whole content is on the disk. Raises StoreError saying
    where and why if it cannot be saved: a result that is not saved must end the run, not be forgotten.
    """
    path = record_path(record, results_dir)
    try:
        content = to_bytes(record)
    except StoreError as error:
        raise StoreError(f"cannot save record {path}: {error}") from error
    write_new(path, content, "record")
    return path


def write_new(path: Path, content: bytes, what: str) -> None:
    """Write a file that does not exist yet, whole or not at all; its folders are made.

    Raises StoreError naming ``what`` it is, where, and why if it cannot be saved.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            _name_without_replacing(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        for folder in (path.parent, path.parent.parent):  # the suite's folder may be new, too
            _sync_directory(folder)
    except FileExistsError as error:
        raise StoreError(
            f"cannot save {what} {path}: a {what} of that name exists and is never overwritten. "
            "Every run needs a run id of its own."
        ) from error
    except OSError as error:
        raise StoreError(
            f"cannot save {what} {path}: {error.strerror or error}. Make room or choose another results folder."
        ) from error


def record_path(record: Record, results_dir: Path) -> Path:
    """``<results>/<suite>/<system>--<model>--<workload>--<spec hash>--<run id>.json``."""
    spec = record.spec
    named = (spec.get("system"), _inside(spec, "model", "shape", "name"), _inside(spec, "workload", "name"))
    parts = [safe_name(part) for part in (*named, record.spec_hash, record.run_id)]
    return Path(results_dir) / suite_folder(record.suite) / ("--".join(parts) + ".json")


def suite_folder(suite: str) -> str:
    """The folder (and report name) of a suite."""
    return safe_name(suite) if suite else NO_SUITE


def to_bytes(record: Record) -> bytes:
    """The exact bytes of a record's file. Raises StoreError if they would be none of this schema, as with a NaN.

    A number that no figure can be is no reason: hours of measuring would be lost for it. Whoever reads it is told.
    """
    text = json.dumps(encode(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    decode(parse(text))
    # Only lone surrogates (bytes of a child's output that were no text) cannot be encoded; the replacement
    # \udcXX is the JSON escape of the same character, so it reads back unchanged.
    return text.encode("utf-8", errors="backslashreplace")


def _inside(data: Any, *keys: str) -> Any:
    for key in keys:
        data = data.get(key) if hasattr(data, "get") else None
    return data


def safe_name(part: Any) -> str:
    """A name that is one path component, holds no separator of ours and is not hidden."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "_", str(part or "unknown"))
    text = re.sub(r"-{2,}", "-", text).strip(".-")
    return text[:_LONGEST_PART].rstrip(".-") or "unknown"


def _name_without_replacing(temporary: Path, path: Path) -> None:
    """Give the finished file its name. A hard link fails where the name is taken; a rename would replace."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        if path.exists():  # a file system without hard links
            raise FileExistsError(errno.EEXIST, "a record of that name exists already") from error
        temporary.rename(path)


def _sync_directory(folder: Path) -> None:
    """Make the new name itself survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
