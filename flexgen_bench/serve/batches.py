"""Batches of a server: their lines fill what places its other requests leave, and their state survives it."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from pathlib import Path
from typing import Any

from flexgen_bench.batch.inputs import Line, custom_id_of, request_of
from flexgen_bench.batch.output_file import OutputFile
from flexgen_bench.batch.scan import Lines, Scan, in_order, scan
from flexgen_bench.core.errors import CannotRun, UserError
from flexgen_bench.core.shard import Shard
from flexgen_bench.requests.answers import Writer
from flexgen_bench.requests.asked import Reader
from flexgen_bench.requests.errors import UNAVAILABLE, RequestError
from flexgen_bench.serve.batch_document import UNDER_WAY, new_batch
from flexgen_bench.serve.engine_loop import Answered, EngineLoop, Event, Ticket
from flexgen_bench.serve.files import Document, Documents, FileStore

_log = logging.getLogger("flexgen_bench.serve")
_SHOW_S = 1.0  # between two times that a batch says how far it is
_RETRY_S = 30.0  # until a batch whose answers could not be written is tried again


class Stopped(Exception):
    """The server goes down: the batch goes on with the next one."""


class Ended(Exception):
    """A batch ends before all of it is answered."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


class Batches:
    """A thread works on one batch after the other, oldest first. at_once: sequences of a batch that are under way.

    Use as a context manager: leaving it stops after what has come; nothing is lost.
    """

    def __init__(
        self, documents: Documents, files: FileStore, loop: EngineLoop, reader: Reader, writer: Writer, at_once: int
    ) -> None:
        self._documents, self._files, self._loop = documents, files, loop
        self._reader, self._writer, self._at_once = reader, writer, at_once
        self._todo: queue.Queue[str | None] = queue.Queue()
        self._stopping = threading.Event()
        self._cancelled: set[str] = set()
        self._shown = float("-inf")  # when a batch has last said how far it is
        self._lock = threading.Lock()  # of documents: a cancellation comes from another thread
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)

    def create(self, file_id: str, endpoint: str, window: str, metadata: Any) -> Document:
        """Queue a batch of a file. window: in hours or days (24h, 7d), after which what is not answered yet is given
        up. RequestError for a file that is not there."""
        try:
            self._files.documents.get(file_id)
        except RequestError as error:
            raise RequestError(error.message, "input_file_id", error.code, error.status) from error
        document = new_batch(self._documents.new_id(), file_id, endpoint, window, metadata)
        self._documents.put(document)
        self._todo.put(document["id"])
        return document

    def cancel(self, name: str) -> Document:
        """End a batch; what is answered stays. Of one that has ended, nothing changes."""
        with self._lock:
            document = self._documents.get(name)
            if document["status"] in UNDER_WAY:
                self._cancelled.add(name)
                document |= {"status": "cancelling", "cancelling_at": int(time.time())}
                self._documents.put(document)
        return document

    def __enter__(self) -> Batches:
        for document in reversed(self._documents.all()):
            if document["status"] in UNDER_WAY:
                if document["status"] == "cancelling":
                    self._cancelled.add(document["id"])
                self._todo.put(document["id"])
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        self._todo.put(None)
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            name = self._todo.get()
            if name is None:
                return
            try:
                self._work(name)
            except Stopped:
                return
            except (UserError, RequestError) as error:
                self._fail(name, str(error))
            except (CannotRun, OSError) as error:  # a full disk, say: what is answered stays, and there will be room
                _log.warning("batch %s waits: %s", name, error)
                self._todo.put(name)
                self._stopping.wait(_RETRY_S)
            except Exception as error:
                _log.exception("batch %s failed", name)
                self._fail(name, f"{type(error).__name__}: {error}")

    def _work(self, name: str) -> None:
        document = self._documents.get(name)
        if document["status"] not in UNDER_WAY:  # queued twice, by who made it and at the start
            return
        self._files.documents.get(document["input_file_id"])  # deleted meanwhile?
        source = self._files.content(document["input_file_id"])
        try:
            scanned = scan([source], None, Shard())
        except UserError as error:  # by the name that the client knows, and what this file could never be called
            raise UserError("input_file_id", document["input_file_id"], error.allowed) from error
        counts = {"total": scanned.lines, "completed": 0, "failed": 0}
        self._change(name, status="in_progress", in_progress_at=int(time.time()), request_counts=counts)
        path = self._documents.path(name, ".answers.jsonl")
        with OutputFile(
            path, {"batch": name, "inputs": [sha for _, sha in scanned.files]}, scanned.positions
        ) as output:
            ended = self._answer_lines(document, scanned, output, counts)
            self._change(name, finalizing_at=int(time.time()))
            output.restore_order()
        self._split(name, scanned.lines, ended)
        for suffix in (".answers.jsonl", ".answers.jsonl.state.json"):
            self._documents.path(name, suffix).unlink(missing_ok=True)

    def _answer_lines(self, document: Document, scanned: Scan, output: OutputFile, counts: dict[str, int]) -> str:
        """All that are not answered yet; the status that the batch has then. As many are under way as have a place; the
        next joins as one comes back."""
        name = document["id"]
        answers: queue.Queue[tuple[Ticket, Event]] = queue.Queue()
        under_way: dict[Ticket, tuple[Line, str | None]] = {}
        self._show(name, counts, output)
        source = self._files.content(document["input_file_id"])
        rows = scanned.order()
        try:
            for line in in_order(rows, [source], None):
                if output.has(line.position):
                    continue
                self._check(document)
                while sum(t.sequences for t in under_way) >= self._at_once:
                    self._receive(answers, under_way, output)
                    self._check(document)
                custom_id = custom_id_of(line)
                try:
                    ticket = self._submit(line, document["endpoint"], answers)
                except RequestError as error:
                    self._refuse(output, line, custom_id, error)
                    continue
                under_way[ticket] = (line, custom_id)
                self._show(name, counts, output)
            while under_way:
                self._check(document)
                self._receive(answers, under_way, output)
                self._show(name, counts, output)
        except Ended as end:
            if end.status == "expired":
                self._give_up(output, rows, source)
            return end.status
        finally:
            for ticket in under_way:
                self._loop.cancel(ticket)
        return "completed"

    def _show(self, name: str, counts: dict[str, int], output: OutputFile) -> None:
        """How many are answered, for who looks: a file is written for it, so not for every one of many."""
        if output.done > counts["completed"] and time.monotonic() - self._shown >= _SHOW_S:
            counts["completed"], self._shown = output.done, time.monotonic()
            self._change(name, request_counts=dict(counts))

    def _give_up(self, output: OutputFile, rows: Lines, source: Path) -> None:
        """Say of every line that is not answered that its time is over."""
        error = RequestError("The completion window was over before this was answered.", None, "batch_expired")
        for line in in_order(rows, [source], None):
            if not output.has(line.position):
                self._refuse(output, line, custom_id_of(line), error)

    def _submit(self, line: Line, endpoint: str, answers: queue.Queue[tuple[Ticket, Event]]) -> Ticket:
        if line.is_repeated:
            raise RequestError("custom_id is that of an earlier line.", "custom_id", "duplicate_custom_id")
        request = request_of(line, "", {})
        if request.url != endpoint:
            raise RequestError(f"url = {request.url!r}: this batch is for {endpoint}.", "url", "invalid_url")
        parsed = self._reader.read(request.url, request.body, seed=line.position)
        made: list[Ticket] = []
        ready = threading.Event()

        def tell(event: Event) -> None:
            if isinstance(event, Answered | RequestError):
                ready.wait()
                answers.put((made[0], event))

        made.append(self._loop.submit(parsed, tell))
        ready.set()
        return made[0]

    def _receive(
        self,
        answers: queue.Queue[tuple[Ticket, Event]],
        under_way: dict[Ticket, tuple[Line, str | None]],
        output: OutputFile,
    ) -> None:
        """Wait a moment for an answer, and write it."""
        try:
            ticket, event = answers.get(timeout=0.2)
        except queue.Empty:
            if self._stopping.is_set():
                raise Stopped from None
            return
        line, custom_id = under_way.pop(ticket)
        if isinstance(event, RequestError):
            if event.status == UNAVAILABLE:  # the server goes down
                raise Stopped
            self._refuse(output, line, custom_id, event)
            return
        assert isinstance(event, Answered)
        body = self._writer.body(ticket.parsed, event.outputs, event.of_prompts, event.kept_tokens)
        response = {"status_code": 200, "request_id": body["id"], "body": body}
        output.write(line.position, custom_id, {"response": response, "error": None})

    def _check(self, document: Document) -> None:
        if self._stopping.is_set():
            raise Stopped
        if document["id"] in self._cancelled:
            raise Ended("cancelled")
        if time.time() >= document["expires_at"]:
            raise Ended("expired")

    @staticmethod
    def _refuse(output: OutputFile, line: Line, custom_id: str | None, error: RequestError) -> None:
        response = {"status_code": error.status, "request_id": f"req_{line.position:09d}", "body": error.body()}
        said = {"code": error.code, "message": error.message}
        output.write(line.position, custom_id, {"response": response, "error": said})

    def _split(self, name: str, total: int, ended: str) -> None:
        """Answers and errors, a file each, as the API has them. ended: the status that the batch has then."""
        counts = {"total": total, "completed": 0, "failed": 0}
        good_id, good = self._files.new_path()
        bad_id, bad = self._files.new_path()
        with (
            self._documents.path(name, ".answers.jsonl").open("rb") as answers,
            good.open("wb") as good_file,
            bad.open("wb") as bad_file,
        ):
            for line in answers:
                is_good = json.loads(line)["error"] is None
                (good_file if is_good else bad_file).write(line)
                counts["completed" if is_good else "failed"] += 1
        changes: Document = {"request_counts": counts}
        for key, file_id, path, count in (
            ("output_file_id", good_id, good, counts["completed"]),
            ("error_file_id", bad_id, bad, counts["failed"]),
        ):
            if count:
                self._files.add(file_id, f"{name}_{key.removesuffix('_file_id')}.jsonl", "batch_output")
                changes[key] = file_id
            else:
                path.unlink()
        with self._lock:
            self._put(name, status=ended, **{f"{ended}_at": int(time.time())}, **changes)
            self._cancelled.discard(name)

    def _fail(self, name: str, message: str) -> None:
        errors = {"object": "list", "data": [{"code": "batch_failed", "message": message, "param": None, "line": None}]}
        try:
            self._change(name, status="failed", failed_at=int(time.time()), errors=errors)
        except OSError:  # the next server finds it under way, and tries again
            _log.exception("batch %s", name)

    def _change(self, name: str, **changes: Any) -> None:
        with self._lock:
            if name in self._cancelled and changes.get("status") == "in_progress":
                changes.pop("status")
            self._put(name, **changes)

    def _put(self, name: str, **changes: Any) -> None:
        self._documents.put({**self._documents.get(name), **changes})
