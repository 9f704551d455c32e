"""A page that watches: what a suite's process writes, and what the server of a machine gives to whom."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.status import Status
from flexgen_bench.page.build import PageBuilder
from flexgen_bench.page.gather import Gatherer
from flexgen_bench.page.live import open_server
from flexgen_bench.runner.progress_file import ProgressFile
from flexgen_bench.store.reader import read_all
from flexgen_bench.store.running import FINISHED, RUNNING, STOPPED, RunningSuite, read_running, write_running
from flexgen_bench.store.writer import write_record
from tests.support.record_factory import make_record


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_record(make_record("flexgen"), tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def port(results: Path, tmp_path: Path) -> Iterator[int]:
    builder = PageBuilder(Gatherer([results]), tmp_path / "page", lambda _: None, tables=())
    builder.build()
    with open_server(builder, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield int(server.server_address[1])
        server.shutdown()
        thread.join(10)


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def state(port: int) -> Any:
    status, content = get(port, "/live.json")
    assert status == 200
    return json.loads(content)


def test_a_suite_tells_what_it_does(results: Path) -> None:
    clock = Clock()
    record = next((results / "default").glob("*.json"))
    with ProgressFile(results, "default", clock) as display:
        display.suite_start([60.0, 30.0, 0.0])
        display.cell_start("flexgen tiny", 1, 3, 60.0)
        display.stage("repetition 1 of 3")
        clock.now += 20
        display.progress("decode", 0, 100, "tokens")
        clock.now += 5
        display.progress("decode", 50, 100, "tokens")
        (suite,) = read_running(results)
        assert suite.state == RUNNING
        assert suite.stage == "repetition 1 of 3"
        assert suite.meter == "decode 50 of 100 tokens, 10.0 tokens/s, 5.0s left"
        assert suite.left_s == 35 + 30
        assert [cell.state for cell in suite.cells] == ["running", "waiting", "waiting"]
        display.cell_end("flexgen tiny", Status.OK, "", record, False)
        display.cell_start("other tiny", 2, 3, 30.0)
        display.cell_end("other tiny", Status.FAILED, "it\nbroke", record, True)
        (suite,) = read_running(results)
        assert suite.cells[0].took_s == 25
        assert suite.cells[0].run == "run0"
        assert (suite.cells[1].state, suite.cells[1].reason, suite.cells[1].took_s) == ("failed", "it broke", None)
        display.suite_end()
    (suite,) = read_running(results)
    assert suite.state == FINISHED
    assert len(read_all(results)[0]) == 1, "what a suite does is no record"
    assert read_all(results)[1] == []


def test_a_suite_that_is_interrupted_is_not_finished(results: Path) -> None:
    """Ctrl-C in the first of two cells was shown as finished, with one cell running for good."""

    def run() -> None:
        with ProgressFile(results, "default") as display:
            display.suite_start([60.0, 30.0])
            display.cell_start("flexgen tiny", 1, 2, 60.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    (suite,) = read_running(results)
    assert suite.state == STOPPED
    assert [cell.state for cell in suite.cells] == ["waiting", "waiting"]


def test_unknown_times_give_no_time_left(results: Path) -> None:
    with ProgressFile(results, "") as display:
        display.suite_start([None, 5.0])
        assert read_running(results)[0].left_s is None


def test_a_suite_whose_process_is_gone_has_stopped(results: Path) -> None:
    """A killed suite would else run for ever on the page."""
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    write_running(RunningSuite(int(ended.stdout), "default", "2026-01-01", ()), results)
    assert read_running(results)[0].state == STOPPED
    (results / ".running-7x.json").write_text("{")
    (results / f".running-{int(ended.stdout)}9999.json").write_text('{"process": 1}')
    assert len(read_running(results)) == 1
    with ProgressFile(results, "next") as display:
        display.suite_start([1.0])
    assert [suite.suite for suite in read_running(results)] == ["next"]
    assert [p.name for p in results.glob(".running*")] == [f".running-{os.getpid()}.json"]


def test_a_file_that_cannot_be_written_stops_no_suite(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    display = ProgressFile(results / "nowhere", "default")
    display.suite_start([1.0])
    display.stage("works")
    assert capsys.readouterr().err.count("cannot be watched") == 1


def test_new_records_make_a_new_edition(results: Path, port: int) -> None:
    first = state(port)
    assert first == {"edition": 0, "suites": [], "problem": ""}
    write_record(make_record("accelerate", run=1), results)
    for _ in range(400):
        if state(port)["edition"] == 1:
            break
        threading.Event().wait(0.05)
    assert b"accelerate" in get(port, "/data/rows.js")[1]


def test_only_this_machine_by_its_name_is_answered(port: int, results: Path, tmp_path: Path) -> None:
    """A page elsewhere could point its own name at 127.0.0.1 and read the records with its visitors' browsers."""
    assert get(port, "/index.html")[0] == 200
    assert get(port, "/live.json", host="localhost")[0] == 200
    assert get(port, "/live.json", host="evil.example")[0] == 403
    assert get(port, "/index.html", host="evil.example")[0] == 403
    assert get(port, "/data/")[0] == 404
    assert get(port, "/../results/default")[0] == 404
    builder = PageBuilder(Gatherer([results]), tmp_path / "page", lambda _: None, tables=())
    with pytest.raises(UserError, match="--port"):
        open_server(builder, port)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "results_dir = 'nowhere'"),
        (["results", "--port", "9"], "--port = 9"),
        (["results", "--live", "--port", "70000"], "--port = 70000"),
        (["results", "--tables", "t2x"], "t2x"),
    ],
)
def test_bad_input_is_refused_in_a_line(
    arguments: list[str], says: str, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flexgen_bench.cli.page import main

    monkeypatch.chdir(results.parent)
    assert main(arguments) == 2
    assert says in capsys.readouterr().err
