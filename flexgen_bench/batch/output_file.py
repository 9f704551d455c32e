"""The file of answers. It is also all there is to know of how far a job has come: an answer that is in it is done.

Every answer is one line, written with one call and never changed. Its ``id`` holds the position of the line that it
answers, so after a kill the same command finds what is missing. A line that a kill has cut is cut off. Beside the file
lies ``<name>.state.json``, which says what the answers belong to.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import CannotRun, UserError
from flexgen_bench.requests.json_line import json_line

_ID = re.compile(rb'\{"id": "batch_req_(\d+)", ')
_SYNC_S = 1.0  # answers of at most so many seconds are lost with the machine's power; with the process none is
_MISSING = -1


class OutputFile:
    """Answers of one job. Use as a context manager.

    belongs_to: what the job is (JSON); positions: one more than the largest of its input. Raises UserError for a file
    that has answers of another job, or of none, and for one that another process writes; nothing is changed then.
    CannotRun where the disk takes no more: what was written before stays.
    """

    def __init__(self, path: Path, belongs_to: Mapping[str, Any], positions: int) -> None:
        # Where a link leads to: a file with answers in order takes the place of that, not of the link.
        path = path.resolve() if path.is_symlink() else path
        self.path, self._state = path, path.with_name(f"{path.name}.state.json")
        self._lock = self._file = -1
        self._offsets = array("q", [_MISSING]) * positions
        self._size, self._synced = 0, time.monotonic()
        self.done = 0
        self._claim(belongs_to)
        try:
            with self._disk():
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                _sync_folder(path.parent)
            self._recover()
        except BaseException:
            self.close()
            raise

    def has(self, position: int) -> bool:
        """Whether the line at this position of the input is answered."""
        return self._offsets[position] != _MISSING

    def write(self, position: int, custom_id: str | None, answer: Mapping[str, Any]) -> None:
        """Add the answer to one line; when this returns, it survives the process."""
        assert not self.has(position), "answered once"
        head = {"id": f"batch_req_{position:09d}", "custom_id": custom_id}
        data = json_line({**head, **answer}) + b"\n"
        with self._disk():
            written = 0
            try:
                while written < len(data):
                    written += os.write(self._file, data[written:])
            except BaseException:
                os.ftruncate(self._file, self._size)  # what is there of the line is no answer
                raise
            self._offsets[position] = self._size
            self._size += len(data)
            self.done += 1
            if time.monotonic() - self._synced > _SYNC_S:
                os.fsync(self._file)
                self._synced = time.monotonic()

    def restore_order(self) -> None:
        """Put the answers into the order of the input, all at once: a copy takes the file's place."""
        if all(a < b for a, b in pairwise(self._answered())):
            return
        copy = self.path.with_name(f".{self.path.name}.ordered")
        try:
            with self._disk(), self.path.open("rb") as source, copy.open("wb") as target:
                for offset in self._answered():
                    source.seek(offset)
                    target.write(source.readline())
                target.flush()
                os.fsync(target.fileno())
        except BaseException:
            copy.unlink(missing_ok=True)
            raise
        os.replace(copy, self.path)
        _sync_folder(self.path.parent)

    def _answered(self) -> Iterator[int]:
        """Where the answers lie, in the order of the input."""
        return (offset for offset in self._offsets if offset != _MISSING)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CannotRun(
                f"{self.path} cannot be written ({error.strerror}). The {self.done} answers that are in it stay; when "
                "there is room the same command goes on"
            ) from error

    def close(self) -> None:
        """Bring everything to disk."""
        file, self._file = self._file, -1
        lock, self._lock = self._lock, -1
        try:
            if file >= 0:
                with self._disk():
                    os.fsync(file)
        finally:
            for opened in (file, lock):
                if opened >= 0:
                    os.close(opened)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _claim(self, belongs_to: Mapping[str, Any]) -> None:
        """Take the file for this job and this process."""
        job = json.loads(json.dumps(belongs_to))
        if str(self.path) == "-" or (self.path.exists() and not self.path.is_file()):
            action = "A folder, a pipe or a terminal cannot say later what is answered."
            raise UserError("--output", str(self.path), "a file", action)
        if self.path.exists() and not self._state.exists() and self.path.stat().st_size:
            raise UserError(
                "--output",
                str(self.path),
                "a new file, or one that this command has begun",
                f"Nothing is overwritten: name another one ({self._state.name} is not beside it).",
            )
        try:
            self._lock = os.open(self._state, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                "--output", str(self.path), f"a file in a folder that can be written ({error.strerror})"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check(job)
        except BlockingIOError as error:
            os.close(self._lock)
            raise UserError("--output", str(self.path), "written by one process", "Another one is at it.") from error
        except BaseException:
            os.close(self._lock)
            raise

    def _check(self, job: dict[str, Any]) -> None:
        written = os.pread(self._lock, 2**24, 0)
        has_answers = self.path.exists() and self.path.stat().st_size > 0
        is_ours, stored_job = not written or written.startswith(b"{"), None
        try:
            stored_job = json.loads(written) if written else None
            is_ours = is_ours and (stored_job is None or job.keys() == stored_job.keys())
        except ValueError:  # cut by a kill before anything was answered, unless there are answers
            pass
        if is_ours and not has_answers:  # nothing that would be lost
            with self._disk():
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, json.dumps(job, indent=1).encode(), 0)
                os.fsync(self._lock)
            return
        if not isinstance(stored_job, dict):
            raise UserError("--output", str(self.path), "beside a state that can be read", f"{self._state} cannot.")
        for key in sorted(job.keys() | stored_job.keys()):
            if job.get(key) != stored_job.get(key):
                raise UserError(
                    "--output",
                    str(self.path),
                    f"of the same job: its answers are for {key} = {stored_job.get(key)}, asked for is {job.get(key)}",
                    "Nothing is overwritten: name another file.",
                )

    def _recover(self) -> None:
        """Find what is answered; cut off what a kill has left of a line."""
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    os.ftruncate(self._file, self._size)
                    break
                self._note(line)
                self._size += len(line)

    def _note(self, line: bytes) -> None:
        id_match = _ID.match(line)
        position = int(id_match[1]) if id_match else len(self._offsets)
        if position >= len(self._offsets) or self.has(position):
            raise UserError(
                "--output",
                str(self.path),
                "as this command has left it",
                f"The line at byte {self._size} is not one that it has written. Name another file.",
            )
        self._offsets[position] = self._size
        self.done += 1


def _sync_folder(folder: Path) -> None:
    """So that the name of a file is on disk, too, where a file system can promise that."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(opened)
