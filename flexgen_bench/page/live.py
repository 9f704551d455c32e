"""The page with a server, for this machine alone: the same files, and what running suites do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.page.build import PageBuilder
from flexgen_bench.store.reader import record_files
from flexgen_bench.store.running import read_running

HOST = "127.0.0.1"
STATE = "live.json"
_LOOK_EVERY_S = 1.0


@dataclass
class Live:
    """Builds the page anew as records come, and tells what suites do. edition: how often the data has changed; problem:
    why the last records are not on the page."""

    builder: PageBuilder
    edition: int = 0
    problem: str = ""
    _stamp: Any = None
    _looked_s: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _building: threading.Thread | None = None

    def state(self) -> dict[str, Any]:
        """What ``live.json`` holds. Raises StoreError if folders cannot be listed."""
        with self._lock:  # several readers ask at once; one of them looks
            now = time.monotonic()
            if self._stamp is None or now - self._looked_s >= _LOOK_EVERY_S:
                self._looked_s = now
                self._look()
        folders = self.builder.gatherer.folders
        suites = [to_json(suite) for folder in folders for suite in read_running(folder)]
        return {"edition": self.edition, "suites": suites, "problem": self.problem}

    def _look(self) -> None:
        """Records are never changed once they are there, so their names tell of every change."""
        stamp = [path for folder in self.builder.gatherer.folders for path in record_files(folder)]
        if self._stamp is None:  # as built
            self._stamp = stamp
        elif stamp != self._stamp and (self._building is None or not self._building.is_alive()):
            self._stamp = stamp
            self._building = threading.Thread(target=self._build, daemon=True)
            self._building.start()

    def _build(self) -> None:
        """Answers go on meanwhile: thousands of records take a while."""
        try:
            self.builder.write_data()
        except Exception as error:  # told on the page; the next look tries again
            self.problem, self._stamp = f"The page could not be made anew: {error}", ()
        else:
            self.problem = ""
            self.edition += 1


class _Handler(SimpleHTTPRequestHandler):
    """Files of the page's folder, to browsers of this machine that name it as it is: a page elsewhere, whose name
    somebody has pointed here, gets nothing."""

    def __init__(self, live: Live, port: Callable[[], int], *arguments: Any, **named: Any) -> None:
        self._live, self._port = live, port
        super().__init__(*arguments, directory=str(live.builder.out), **named)

    def do_GET(self) -> None:
        """A file, or the state."""
        if self._is_asked_properly():
            if self._is_hidden():
                self.send_error(404)
            elif self.path.partition("?")[0] == f"/{STATE}":
                self._send_state()
            else:
                super().do_GET()

    def do_HEAD(self) -> None:
        """The same without content."""
        if self._is_asked_properly():
            if self._is_hidden():
                self.send_error(404)
            else:
                super().do_HEAD()

    def _is_hidden(self) -> bool:
        """Nothing of a page is."""
        return any(part.startswith(".") for part in unquote(self.path.partition("?")[0]).split("/"))

    def list_directory(self, path: Any) -> None:
        """No lists of what lies in the folder."""
        self.send_error(404)

    def end_headers(self) -> None:
        """What is served now is read now."""
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Not every request is news."""

    def _is_asked_properly(self) -> bool:
        names = {f"{name}:{self._port()}" for name in (HOST, "localhost")}
        if self.headers.get("Host") in names:
            return True
        self.send_error(403, "Ask for 127.0.0.1 or localhost")
        return False

    def _send_state(self) -> None:
        try:
            content, status = json.dumps(self._live.state()), 200
        except StoreError as error:
            content, status = json.dumps({"error": str(error)}), 500
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content.encode())


def open_server(builder: PageBuilder, port: int) -> ThreadingHTTPServer:
    """A server of a built page on the loopback interface. Raises UserError for a port that cannot be had."""
    live = Live(builder)
    live.state()
    server: ThreadingHTTPServer
    handler = partial(_Handler, live, lambda: int(server.server_address[1]))
    try:
        server = ThreadingHTTPServer((HOST, port), handler)
    except OSError as error:
        action = "Choose another, or 0 for any that is free."
        raise UserError("--port", port, f"a free port ({error.strerror})", action) from error
    server.daemon_threads = True
    return server


def serve(builder: PageBuilder, port: int, tell: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. tell: gets the address."""
    with open_server(builder, port) as server:
        tell(f"http://{HOST}:{server.server_address[1]}/#live (Ctrl-C ends it)")
        server.serve_forever()
