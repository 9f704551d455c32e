"""Files as people have them: written by other programs, cut, changed, too long, on a disk that is full."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.batch import inputs
from flexgen_bench.batch.inputs import Line, check_inputs, custom_id_of, request_of
from flexgen_bench.batch.output_file import OutputFile
from flexgen_bench.batch.scan import in_order, scan
from flexgen_bench.cli import batch
from flexgen_bench.core.errors import CannotRun, UserError
from flexgen_bench.core.shard import Shard
from flexgen_bench.requests.errors import RequestError


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def read_again(path: Path, column: str | None = None, shard: str = "1/1") -> list[Line]:
    """The lines as a job gets them, in the order of the input."""
    scanned = scan([path], column, Shard.parse(shard))
    return sorted(in_order(scanned.order(), [path], column), key=lambda line: line.position)


def prompts(lines: list[Line]) -> list[Any]:
    return [request_of(line, "m", {}).body["prompt"] for line in lines]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_marks_and_line_ends_of_other_editors_are_no_text(tmp_path: Path, mark: bytes, end: bytes) -> None:
    """The byte order mark that Windows' editors and Excel write made the first line of JSON invalid, and was the first
    character of the first prompt of a text."""
    text = written(tmp_path / "a.txt", mark + end.join([b"one", b"", b"   ", b" two ", "drei ä".encode()]))
    assert prompts(read_again(text)) == ["one", " two ", "drei ä"]
    table = written(tmp_path / "a.jsonl", mark + end.join([b'{"prompt": "a"}', b"", b'{"prompt": "b"}', b""]))
    assert prompts(read_again(table)) == ["a", "b"]


def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of one line of many gigabytes used to be read whole."""
    monkeypatch.setattr(inputs, "MOST_LINE", 100)
    good = [json.dumps({"prompt": prompt}).encode() for prompt in "abc"]
    lines = [good[0], b"x" * 1000, good[1], b"y" * 101, b"z" * 100, good[2], b"q" * 202]
    path = written(tmp_path / "a.jsonl", b"\n".join(lines))
    found = read_again(path)
    assert [line.position for line in found] == list(range(7))
    assert max(len(line.raw) for line in found) == 101
    assert prompts([found[0], found[2], found[5]]) == ["a", "b", "c"]
    for line in (found[1], found[3], found[4], found[6]):
        with pytest.raises(RequestError, match="longer than 100 bytes"):
            request_of(line, "m", {})


def test_an_input_that_changes_is_noticed(tmp_path: Path) -> None:
    """A line of a file that somebody rewrote meanwhile used to be answered with an error as if it had been bad."""
    path = written(tmp_path / "a.jsonl", b'{"prompt": "a"}\n{"prompt": "b"}\n')
    scanned = scan([path], None, Shard())
    written(path, b'{"prompt": "a"}\n')
    with pytest.raises(UserError, match="Its line 1"):
        list(in_order(scanned.order(), [path], None))


def test_names_that_are_there_twice(tmp_path: Path) -> None:
    names = ["a", "b", "a", None, None, "c", "a"]
    lines = [{"custom_id": name, "prompt": "x"} if name else {"prompt": "x"} for name in names]
    path = written(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    found = read_again(path)
    assert [line.is_repeated for line in found] == [False, False, True, False, False, False, True]
    assert [custom_id_of(line) for line in found] == names
    # What another shard has counts, too.
    assert [line.is_repeated for line in read_again(path, shard="3/3")] == [True, False]


def test_columns_of_a_table(tmp_path: Path) -> None:
    """Lists of ids used to be asked as the text of a list; conversations as the text of JSON."""
    import pyarrow as pa
    from pyarrow.parquet import write_table

    messages = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "So", "name": "Ann"}]
    path = tmp_path / "a.parquet"
    write_table(pa.table({"t": ["a", None], "ids": [[1, 2], [3]], "chat": [messages, []], "n": [1, 2]}), path)
    assert prompts(read_again(path, "t")) == ["a", None]
    assert prompts(read_again(path, "ids")) == [[1, 2], [3]]
    assert prompts(read_again(path, "n")) == [1, 2]  # refused by the form, as null is
    asked = request_of(read_again(path, "chat")[0], "m", {"max_tokens": 5})
    assert asked.url == "/v1/chat/completions"
    assert asked.body == {"model": "m", "messages": messages, "max_tokens": 5}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.jsonl.gz", "Unpack it first"),
        ("-", "Write it to a file first"),
        ("/dev/stdin", "Write it to a file first"),
        ("folder.jsonl", "a file that exists"),
        ("broken.parquet", "a parquet file"),
    ],
)
def test_inputs_that_cannot_be_read(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    written(tmp_path / "a.jsonl.gz", b"\x1f\x8b")
    written(tmp_path / "broken.parquet", b"PAR1")
    path = Path(name) if name in ("-", "/dev/stdin") else tmp_path / name
    with pytest.raises(UserError, match=said):
        check_inputs([path], "column" if name.endswith("parquet") else None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    written(tmp_path / "a.txt", b"a").chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        check_inputs([tmp_path / "a.txt"], None)


@pytest.mark.parametrize("name", ["-", "folder", "/dev/null"])
def test_an_output_that_is_no_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="must be a file"):
        OutputFile(tmp_path / "folder" if name == "folder" else Path(name), {"inputs": []}, 1)
    assert not list(tmp_path.glob("*.state.json"))


def test_an_output_that_is_the_input_by_another_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "a.jsonl", b'{"prompt": "a"}\n')
    os.link(path, tmp_path / "b.jsonl")
    assert batch.main([str(path), "-o", str(tmp_path / "b.jsonl"), "model=none"]) == 2
    assert "another file than the input" in capsys.readouterr().err


def test_a_job_that_was_named_wrongly_and_answered_nothing_can_be_named_again(tmp_path: Path) -> None:
    """The first command had a mistake in it and was ended: its state, without any answers, used to refuse the next."""
    path = tmp_path / "out.jsonl"
    with OutputFile(path, {"inputs": ["wrong"]}, 3):
        pass
    with OutputFile(path, {"inputs": ["right"]}, 3) as output:
        output.write(0, None, {"response": 0})
    with pytest.raises(UserError, match="of the same job"):
        OutputFile(path, {"inputs": ["wrong"]}, 3)


def test_a_state_of_somebody_else_stays(tmp_path: Path) -> None:
    state = written(tmp_path / "out.jsonl.state.json", b'{"mine": 1}')
    with pytest.raises(UserError, match="state"):
        OutputFile(tmp_path / "out.jsonl", {"inputs": []}, 3)
    assert state.read_bytes() == b'{"mine": 1}'


def test_a_shard_without_lines_is_done_at_once(tmp_path: Path) -> None:
    """One of more machines than there are lines: its part is an empty file, not an error."""
    path = written(tmp_path / "a.txt", b"one\ntwo\n")
    out = tmp_path / "part.jsonl"
    assert batch.main([str(path), "-o", str(out), "--shard", "3/3", "model=no-such-model"]) == 0
    assert out.read_bytes() == b""


def test_a_full_disk_keeps_what_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a line fits: it is taken back, so that what comes next is not appended to it."""
    path, real = tmp_path / "out.jsonl", os.write

    def full(file: int, data: bytes) -> int:
        if len(data) > 20:
            return real(file, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with OutputFile(path, {"inputs": []}, 3) as output:
        output.write(1, "b", {"response": "b"})
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(CannotRun, match="No space left on device"):
            output.write(0, "a", {"response": "a" * 100})
        monkeypatch.undo()
        assert not output.has(0)
        output.write(0, "a", {"response": "a"})
        output.restore_order()
    assert [json.loads(line)["response"] for line in path.read_text().splitlines()] == ["a", "b"]


def test_order_that_finds_no_room_leaves_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    with OutputFile(path, {"inputs": []}, 3) as output:
        output.write(1, "b", {"response": "b"})
        output.write(0, "a", {"response": "a"})
        before = path.read_bytes()

        def full(file: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CannotRun, match="No space left on device"):
            output.restore_order()
        monkeypatch.undo()
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.state.json"]
