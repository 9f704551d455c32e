"""How batches of a server end that do not simply complete: too late, without their file, on a full disk."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flexgen_bench import LLM
from flexgen_bench.requests.answers import Writer
from flexgen_bench.requests.asked import Limits, Reader
from flexgen_bench.requests.errors import RequestError
from flexgen_bench.schedule.sequence_groups import Capacity
from flexgen_bench.serve import batches as module
from flexgen_bench.serve.batch_document import UNDER_WAY
from flexgen_bench.serve.batches import Batches
from flexgen_bench.serve.engine_loop import EngineLoop
from flexgen_bench.serve.files import Document, Documents, FileStore

LINES = 6


class Parts:
    """A server's batches without HTTP."""

    def __init__(self, llm: LLM, folder: Path) -> None:
        self.files, self.documents = FileStore(folder / "files"), Documents(folder / "batches", "batch")
        self.loop = EngineLoop(llm, Capacity(4, 100, 20))
        reader = Reader(llm.tokenizer, llm.shape, ("tiny",), Limits(100, 20))
        self.batches = Batches(self.documents, self.files, self.loop, reader, Writer(llm.tokenizer), 4)

    def batch(self, window: str = "24h", content: str = "") -> str:
        name, path = self.files.new_path()
        body = {"model": "tiny", "prompt": "a", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
        line = {"method": "POST", "url": "/v1/completions", "body": body}
        lines = "".join(json.dumps({"custom_id": f"line {n}", **line}) + "\n" for n in range(LINES))
        path.write_text(content or lines)
        self.files.add(name, "in.jsonl", "batch")
        return str(self.batches.create(name, "/v1/completions", window, None)["id"])

    def ended(self, name: str) -> Document:
        end = time.monotonic() + 100
        while (document := self.documents.get(name))["status"] in UNDER_WAY:
            assert time.monotonic() < end, document
            time.sleep(0.02)
        return document

    def answers(self, file_id: str) -> list[Document]:
        return [json.loads(line) for line in self.files.content(file_id).read_text().splitlines()]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        with self.loop, self.batches:
            yield


@pytest.fixture
def parts(llm: LLM, tmp_path: Path) -> Parts:
    return Parts(llm, tmp_path)


def test_what_is_answered_lies_in_one_place(parts: Parts) -> None:
    """The file that a batch is written to used to stay beside the one that its owner gets: twice the disk."""
    name = parts.batch()
    with parts.at_work():
        document = parts.ended(name)
        end = time.monotonic() + 10
        while parts.documents.path(name, ".answers.jsonl").exists():
            assert time.monotonic() < end
    assert document["status"] == "completed"
    assert len(parts.answers(document["output_file_id"])) == LINES
    assert [path.name for path in (parts.documents.path(name).parent).iterdir()] == [f"{name}.json"]


def test_a_file_that_is_none_is_named_as_its_owner_knows_it(parts: Parts) -> None:
    """The error named a path of the server's disk, and told the client to call that file otherwise."""
    name = parts.batch(content="hello\n" * 30)
    with parts.at_work():
        document = parts.ended(name)
    said = document["errors"]["data"][0]["message"]
    assert document["status"] == "failed"
    assert said.startswith(f"input_file_id = '{document['input_file_id']}': must be JSONL")
    assert "/" not in said
    assert ".txt" not in said
    with pytest.raises(RequestError) as caught:
        parts.batches.create("file-x", "/v1/completions", "24h", None)
    assert caught.value.param == "input_file_id"


def test_how_far_a_batch_is_can_be_seen(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch of less than a hundred lines nothing was completed until all was; after a restart neither."""
    monkeypatch.setattr(module, "_SHOW_S", 0.0)
    name, seen = parts.batch(), list[int]()
    put = parts.documents.put
    monkeypatch.setattr(
        parts.documents, "put", lambda document: (seen.append(document["request_counts"]["completed"]), put(document))
    )
    with parts.at_work():
        parts.ended(name)
    assert len(set(seen)) > 3
    assert seen == sorted(seen)


def test_half_of_a_file_can_be_thrown_away(parts: Parts) -> None:
    """What an upload had written before the disk was full stayed there: nobody could ask for it or delete it."""
    name, path = parts.files.new_path()
    path.write_text("half")
    parts.files.discard(name)
    assert not list(path.parent.iterdir())


def test_a_batch_expires(parts: Parts) -> None:
    """What is not answered when its window is over says so; the window used to be taken and ignored."""
    name = parts.batch("2h")
    document = parts.documents.get(name)
    assert document["expires_at"] == document["created_at"] + 2 * 3600
    parts.documents.put({**document, "expires_at": int(time.time()) - 1})
    with parts.at_work():
        document = parts.ended(name)
    assert document["status"] == "expired"
    assert document["expired_at"]
    assert document["request_counts"] == {"total": LINES, "completed": 0, "failed": LINES}
    assert document["output_file_id"] is None
    errors = parts.answers(document["error_file_id"])
    assert {error["custom_id"] for error in errors} == {f"line {n}" for n in range(LINES)}
    assert {error["error"]["code"] for error in errors} == {"batch_expired"}


@pytest.mark.parametrize("window", ["", "24", "0h", "soon", "24h ", "1w", "999999h"])
def test_a_window_that_is_none(parts: Parts, window: str) -> None:
    with pytest.raises(RequestError, match="completion_window"):
        parts.batch(window)
    assert parts.documents.all() == []


def test_its_file_is_deleted_before_its_turn(parts: Parts) -> None:
    name = parts.batch()
    parts.files.delete(parts.documents.get(name)["input_file_id"])
    with parts.at_work():
        document = parts.ended(name)
    assert document["status"] == "failed"
    assert "There is no file" in document["errors"]["data"][0]["message"]


def test_a_full_disk_is_waited_for(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """It used to fail the batch for good, or to end the thread of all batches."""
    monkeypatch.setattr(module, "_RETRY_S", 0.05)
    real, refused = os.write, 0

    def full(file: int, data: bytes) -> int:
        nonlocal refused
        if refused < 3 and b"batch_req" in data:
            refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data)

    monkeypatch.setattr(os, "write", full)
    name = parts.batch()
    with parts.at_work():
        document = parts.ended(name)
    assert refused == 3
    assert document["status"] == "completed"
    assert len(parts.answers(document["output_file_id"])) == LINES
