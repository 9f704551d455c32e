"""The file of answers after kills, and in the hands of the wrong job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexgen_bench.batch.output_file import OutputFile
from flexgen_bench.core.errors import UserError

JOB = {"inputs": ["a"], "shard": "1/1"}


def opened(path: Path, job: dict[str, object] | None = None, positions: int = 10) -> OutputFile:
    return OutputFile(path, job or JOB, positions)


def positions_in(path: Path) -> list[int]:
    return [json.loads(line)["response"] for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    output_path = tmp_path / "out.jsonl"
    with opened(output_path) as file:
        for position in (3, 1, 7):
            file.write(position, f"é{position}", {"response": position, "error": None})
    return output_path


def test_what_is_answered_is_known_again(path: Path) -> None:
    with opened(path) as file:
        assert [p for p in range(10) if file.has(p)] == [1, 3, 7]
        file.write(0, None, {"response": 0, "error": None})
        file.restore_order()
    assert positions_in(path) == [0, 1, 3, 7]
    with opened(path) as file:
        assert file.done == 4


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_that_a_kill_has_cut_is_answered_again(path: Path, cut: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with opened(path) as file:
        assert [p for p in range(10) if file.has(p)] == [1, 3]
        file.write(7, "é7", {"response": 7, "error": None})
    assert path.read_bytes() == whole


def test_a_kill_while_order_is_restored(path: Path) -> None:
    """The copy is there, the file it was to replace is whole."""
    copy = path.with_name(f".{path.name}.ordered")
    copy.write_text("half of a li")
    with opened(path) as file:
        file.restore_order()
    assert positions_in(path) == [1, 3, 7]
    assert not copy.exists()


def test_answers_to_something_else_stay(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(UserError, match="of the same job"):
        opened(path, {**JOB, "shard": "2/3"})
    state = path.with_name("out.jsonl.state.json")
    state.unlink()
    with pytest.raises(UserError, match="Nothing is overwritten"):
        opened(path)
    path.with_name("other.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="Nothing is overwritten"):
        opened(path.with_name("other.jsonl"))
    assert path.read_bytes() == before
    assert path.with_name("other.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize(
    "line", ["rubbish\n", '{"id": "batch_req_000000003", "x": 1}\n', '{"id": "batch_req_99", "x": 1}\n']
)
def test_a_file_that_somebody_has_changed_is_refused(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line)
    with pytest.raises(UserError, match="not one that it has written"):
        opened(path)


def test_one_process_at_a_time(path: Path) -> None:
    with opened(path), pytest.raises(UserError, match="Another one is at it"):
        opened(path)


def test_a_state_that_a_kill_has_cut(tmp_path: Path) -> None:
    """Before anything is answered it is written anew; beside answers nobody can say whose they are."""
    path = tmp_path / "out.jsonl"
    path.with_name("out.jsonl.state.json").write_text('{"inputs": [')
    with opened(path) as file:
        file.write(0, None, {"response": 0})
    path.with_name("out.jsonl.state.json").write_text("")
    with pytest.raises(UserError, match="state"):
        opened(path)


def test_half_of_a_character_in_a_name(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with opened(path) as file:
        file.write(0, "\ud800", {"response": "ü"})
    assert json.loads(path.read_text())["custom_id"] == "\ud800"
