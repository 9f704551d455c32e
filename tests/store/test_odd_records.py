"""Records that are readable and yet odd: none of them hides the others, whatever is made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.cli import compare, page, picture, report, trace
from flexgen_bench.cli.main import main
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
    assert len(problems) == 2 * len(NUMBERS)
    assert all("Delete it and measure the cell again" in problem.message for problem in problems)
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


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    """A record that could not be read again is refused when it is saved, not when it is looked for."""
    from flexgen_bench.core.errors import StoreError

    with pytest.raises(StoreError, match="which no figure of a run is"):
        write_record(make_record(load_s=1e300), tmp_path)
    path = write_record(make_record(), tmp_path)
    assert json.loads(path.read_text())["load_s"] == read_paths([path])[0][0].record.load_s
