"""Records that are readable and yet odd: none of them hides the others, whatever is made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.cli import compare, page, picture, report, trace
from flexgen_bench.cli.main import main
from flexgen_bench.core.errors import StoreError
from flexgen_bench.store.reader import read_all, read_paths
from flexgen_bench.store.writer import to_bytes, write_record
from tests.support.record_factory import make_record

COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    "report": lambda results, out: len(report.build_reports(results, out)),
    "page": lambda results, out: page.main([str(results), "--out", str(out), "--tables", "none"]),
    "picture": lambda results, out: picture.main(["all", "--results", str(results), "-o", str(out)]),
    "compare": lambda results, out: compare.main([str(results), str(results)]),
    "trace": lambda results, out: trace.main(["latest", "--results", str(results), "--out", str(out)]),
}
# Put into a record in the place of a field: what each of them did to at least one command is in the test below.
NUMBERS = ["1e999", "1e308", "5e-324", "1" + "0" * 400, "9" * 5000]


def odd(folder: Path, name: str, replaced: str, by: str) -> None:
    text = to_bytes(make_record(run=9)).decode()
    assert replaced in text
    (folder / f"flexgen--tiny--8-4--0000000000000000--{name}.json").write_text(text.replace(replaced, by, 1))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "results"
    suite = write_record(make_record(run=1), folder).parent
    write_record(make_record("accelerate", run=2), folder)
    for place, number in enumerate(NUMBERS):
        odd(suite, f"sample{place}", '"decode_s": 3.0', f'"decode_s": {number}')
        odd(suite, f"free{place}", '"num_prompts": 4', f'"num_prompts": {number}')
        odd(suite, f"option{place}", '"system_options": {}', f'"system_options": {{"x": {number}}}')
    # Of the same cell as the first, and later.
    odd(suite, "tokens", '"token_ids": [\n', '"token_ids": [\n null,\n')
    odd(suite, "spec", '"shape": {', '"shape": null, "other": {')
    odd(suite, "half", '"rerun_command": "', '"rerun_command": "\\ud800')
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_the_others(
    results: Path, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A number of 5,000 digits, one that is infinite as a float, a null among lists of tokens, half of a character in
    a command: each ended a command with a traceback that hid all other records."""
    status = COMMANDS[command](results, tmp_path / "out")
    said = capsys.readouterr()
    if command == "report":
        table = (tmp_path / "out" / "default.md").read_text()
        assert "accelerate" in table
        assert "sample0" in table
    else:
        # None has a trace; what cannot be used on a side is no success.
        assert status == {"page": 0, "picture": 0, "compare": 1, "trace": 2}[command], said.err


def test_what_is_wrong_is_said_of_each(results: Path) -> None:
    records, problems = read_all(results)
    assert {stored.record.spec["system"] for stored in records} >= {"flexgen", "accelerate"}
    # What is too small counts as 0. Of options, any number that Python reads is as good as another.
    assert len(problems) == 2 * (len(NUMBERS) - 1) + 2
    assert all("and measure the cell again" in problem.message for problem in problems)
    assert max(len(problem.message) for problem in problems) < 1000


def test_a_terminal_that_cannot_show_a_character_ends_no_command(tmp_path: Path) -> None:
    """Over a pipe with an encoding of its own, or of half of a character, ``print`` raised."""
    import io
    import sys

    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    before, sys.stdout = sys.stdout, stream
    try:
        assert main(["help"]) == 0
        print("ü\ud800")
        stream.flush()
    finally:
        sys.stdout = before
    assert raw.getvalue().endswith(b"\\xfc\\ud800\n")


@pytest.mark.parametrize("number", [1e-40, 5e-324, -1e-31, 1e40, 10**40])
def test_odd_numbers_are_no_reason_not_to_save(number: float, tmp_path: Path) -> None:
    """One anywhere in a record, such as an underflow in a prediction, was refused after hours of measuring. Options
    come back as they were."""
    record = make_record()
    odd = replace(record, spec={**record.spec, "system_options": {"x": number, "deep": [{"y": number}]}})
    if abs(number) < 1:
        odd = replace(odd, prediction={"prefill_s": number})
    path = write_record(odd, tmp_path)
    [stored], problems = read_paths([path])
    assert not problems
    assert stored.record.spec == odd.spec
    assert stored.record.prediction == dict.fromkeys(odd.prediction, 0.0)


def test_what_no_figure_can_be_is_saved_and_said_when_read(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot save record"):
        write_record(make_record(times=[(1.0, float("nan"))]), tmp_path)
    path = write_record(make_record(load_s=1e300), tmp_path)
    assert json.loads(path.read_text())["load_s"] == 1e300
    _, [problem] = read_paths([path])
    assert "record.load_s holds the number 1e+300, which no figure of a run is" in problem.message
