"""What a suite shows: plain lines in a log, bars on a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
from pathlib import Path

import pytest

from flexgen_bench.core.status import Status
from flexgen_bench.runner.display import Meter, ProgressDisplay, suite_time
from flexgen_bench.runner.events import Display, show
from flexgen_bench.store.writer import write_record
from tests.support.record_factory import make_record


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_are_few_and_tell_rate_and_time_left(tmp_path: Path) -> None:
    out, clock = io.StringIO(), Clock()
    path = write_record(make_record(times=[(1.0, 3.0)]), tmp_path)
    display: Display = ProgressDisplay(out, clock)
    display.suite_start([73.0, 0.0, None])
    display.cell_start("flexgen tiny", 1, 2, 73.0)
    display.stage("repetition 1 of 1")
    display.progress("prefill", 64, 64, "tokens")
    for tokens in range(1, 101):
        clock.now += 0.5
        display.progress("decode", 2 * tokens, 200, "tokens")
    display.cell_end("flexgen tiny", Status.OK, "", path, False)
    lines = out.getvalue().splitlines()
    assert lines[0] == "3 cells: about 1 min, 1 finished or not possible here, 1 of unknown time"
    assert lines[1:3] == ["[1/2] flexgen tiny: started, about 1 min", "    repetition 1 of 1"]
    assert lines[3] == "    decode: 40 of 200 tokens, 4.0 tokens/s, 40.0s left"
    assert len([line for line in lines if "decode" in line]) == 5
    assert lines[-1] == "flexgen tiny: ok, 4.00 tok/s MEASURED, took 50.0s"
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize(
    ("expected_s", "text"),
    [
        ([], ""),
        ([0.0, 0.0], "2 cells, nothing left to run"),
        ([None], "1 cell: 1 of unknown time"),
        ([20.0, 200.0], "2 cells: about 4 min"),
        ([4.0, 0.0], "2 cells: about 10 s, 1 finished or not possible here"),
        ([54.0], "1 cell: about 50 s"),
        ([56.0], "1 cell: about 1 min"),
        ([5400.0, 3600.0], "2 cells: about 2 h"),
    ],
)
def test_the_time_of_a_suite(expected_s: list[float | None], text: str) -> None:
    assert suite_time(expected_s) == text


def test_bytes_are_shown_as_bytes() -> None:
    out, clock = io.StringIO(), Clock()
    display = ProgressDisplay(out, clock)
    display.stage("converting")
    for done in range(6):
        clock.now += 4
        display.progress("convert", done * 2**28, 5 * 2**28, "B")
    assert "    convert: 512.00 MiB of 1.25 GiB, 64.00 MiB/s, 12.0s left" in out.getvalue()


def test_prefill_and_decode_taking_turns_each_keep_their_own_rate() -> None:
    out, clock = io.StringIO(), Clock()
    display = ProgressDisplay(out, clock)
    display.stage("repetition")
    for batch in range(1, 5):
        clock.now += 1
        display.progress("prefill", 100 * batch, 400, "tokens")
        clock.now += 9
        display.progress("decode", 9 * batch, 36, "tokens")
    assert "    decode: 9 of 36 tokens, 1.0 tokens/s, 27.0s left" in out.getvalue()
    assert display._meters["prefill"].rate == pytest.approx(100)
    assert display._meters["decode"].rate == pytest.approx(1)


def test_what_an_interrupted_conversion_left_is_not_speed() -> None:
    meter = Meter("B", total=100)
    meter.advance(50, 0.1)
    meter.advance(60, 10.0)
    assert meter.rate == 1.0
    assert meter.left_s == 40.0


def test_skipped_and_failed_cells_say_so(tmp_path: Path) -> None:
    out = io.StringIO()
    display = ProgressDisplay(out, Clock())
    path = write_record(make_record(), tmp_path)
    display.cell_end("a", Status.OK, "", path, True)
    display.cell_end("b", Status.OOM, "memory\ncap", path, False)
    first, second = out.getvalue().splitlines()
    assert first == "a: ok, 3.00 tok/s MEASURED, measured before (rerun=true measures it again)"
    assert second == "b: oom, memory cap, took 0.0s"


def test_event_lines_reach_the_display() -> None:
    out, clock = io.StringIO(), Clock()
    display = ProgressDisplay(out, clock)
    show('{"event": "stage", "text": "loading [weights]"}', display)
    clock.now = 20.0
    show('{"event": "progress", "what": "load", "done": 1024, "total": 2048, "unit": "B"}', display)
    assert out.getvalue().splitlines() == ["    loading [weights]", "    load: 1.00 KiB of 2.00 KiB"]


def test_a_terminal_gets_bars_that_go_away(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    path = write_record(make_record(), tmp_path)
    clock = Clock()
    with open(follower, "w", encoding="utf-8") as terminal:
        with ProgressDisplay(terminal, clock) as display:
            assert display._bars is not None
            display.cell_start("flexgen tiny", 1, 2, None)
            display.stage("repetition 1 of 1")
            for tokens in (10, 20, 30):
                clock.now += 1.0
                display.progress("decode", tokens, 100, "tokens")
            display._bars._progress.refresh()
            display.cell_end("flexgen tiny", Status.OK, "", path, False)
        terminal.flush()
        seen = os.read(leader, 2**16).decode()
    os.close(leader)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    assert "cell 1 of 2" in text
    assert "30 of 100 tokens, 10.0 tokens/s, 7.0s left" in text
    assert "flexgen tiny: ok, 3.00 tok/s MEASURED" in text
