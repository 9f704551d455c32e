"""Files for batches, on disk: their bytes, and beside them what the API says of them."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexgen_bench.core.errors import UserError
from flexgen_bench.requests.errors import NOT_FOUND, RequestError

_ID = re.compile(r"(file|batch)-[0-9a-f]{32}")
Document = dict[str, Any]


class Documents:
    """JSON documents by id, a file each, replaced as a whole: a kill leaves the old one or the new one."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder, self._kind = folder, kind
        folder.mkdir(parents=True, exist_ok=True)

    def new_id(self) -> str:
        return f"{self._kind}-{uuid.uuid4().hex}"

    def path(self, name: str, suffix: str = ".json") -> Path:
        """RequestError for what is no id: it never becomes a path."""
        if not _ID.fullmatch(name) or not name.startswith(self._kind):
            raise self._unknown(name)
        return self._folder / f"{name}{suffix}"

    def put(self, document: Mapping[str, Any]) -> None:
        path = self.path(str(document["id"]))
        copy = path.with_suffix(".new")
        with copy.open("w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(copy, path)

    def get(self, name: str) -> Document:
        try:
            document = json.loads(self.path(name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise self._unknown(name) from error
        assert isinstance(document, dict)
        return document

    def all(self) -> list[Document]:
        """Newest first."""
        paths = [path for path in self._folder.glob(f"{self._kind}-*.json") if _ID.fullmatch(path.stem)]
        documents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        return sorted(documents, key=lambda document: (document["created_at"], document["id"]), reverse=True)

    def _unknown(self, name: str) -> RequestError:
        return RequestError(f"There is no {self._kind} {name[:80]!r}.", f"{self._kind}_id", "not_found", NOT_FOUND)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The folder of files and batches, for this process alone: two servers would answer the same batch. UserError if
    another one has it."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(
            "--state", str(folder), "of one server", "Another one runs on it: name another folder."
        ) from error
    finally:
        os.close(lock)


class FileStore:
    """Files that clients have sent, and those that batches have written."""

    def __init__(self, folder: Path) -> None:
        self.documents = Documents(folder, "file")

    def new_path(self) -> tuple[str, Path]:
        """An id, and where its bytes go before ``add``."""
        name = self.documents.new_id()
        return name, self.content(name)

    def content(self, name: str) -> Path:
        return self.documents.path(name, ".jsonl")

    def add(self, name: str, filename: str, purpose: str) -> Document:
        """Make known a file whose bytes are there."""
        document = {
            "id": name,
            "object": "file",
            "bytes": self.content(name).stat().st_size,
            "created_at": int(time.time()),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        self.documents.put(document)
        return document

    def delete(self, name: str) -> None:
        self.documents.get(name)
        self.discard(name)

    def discard(self, name: str) -> None:
        """Remove what is there of a file, whole or not."""
        self.documents.path(name).unlink(missing_ok=True)
        self.content(name).unlink(missing_ok=True)
