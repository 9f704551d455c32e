"""Lines as other programs write them: what one of them asks for neither ends the job nor depends on its neighbours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.batch.inputs import lines_of, request_of
from flexgen_bench.batch.output_file import OutputFile
from flexgen_bench.cli import batch
from flexgen_bench.core.errors import UserError
from flexgen_bench.requests.chat_template import check_messages
from flexgen_bench.requests.errors import RequestError
from flexgen_bench.requests.json_line import json_line
from tests.support.tiny_text_models import CHAT_TEMPLATE, text_model

USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("odd") / "ckpt", "llama", chat_template=CHAT_TEMPLATE)


def answered(model: Path, folder: Path, lines: list[dict[str, Any]], *words: str, status: int = 0) -> list[Any]:
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [f"model={model}", "name=m", "gpu=cpu", "threads=1", f"cache_dir={model.parent / 'cache'}", *words]
    assert batch.main([str(source), "-o", str(out), *given]) == status
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def openai_line(number: int, **body: Any) -> dict[str, Any]:
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return {"custom_id": str(number), "method": "POST", "url": url, "body": {"model": "m", **body}}


def new_tokens(answer: Any) -> int:
    return int(answer["response"]["body"]["usage"]["completion_tokens"])


def test_one_odd_line_does_not_end_the_job(model: Path, tmp_path: Path) -> None:
    """A top_p below what float32 holds left no token to choose, which failed the pass of all; half of a character in a
    role reached the tokenizer. The job ended with a traceback, and so did the same command again."""
    wrong = [
        openai_line(0, prompt="x", temperature=1, top_p=1e-300, max_tokens=2),
        openai_line(1, messages=[{"role": "\ud800", "content": "x"}]),
        openai_line(2, prompt="x", max_tokens=2),
    ]
    found = answered(model, tmp_path, wrong)
    assert [answer["response"]["status_code"] for answer in found] == [200, 400, 200]
    assert "messages[0].role" in found[1]["error"]["message"]


def test_lengths_that_nobody_states_are_within_the_limit(model: Path, tmp_path: Path) -> None:
    """answer_tokens=3 did not hold for completions that say nothing of max_tokens: they got 16. And one at the end of
    the model's positions was refused for the 16 that it had not asked for."""
    long = "y" * 125
    lines = [openai_line(0, prompt="x"), openai_line(1, messages=[USER]), {"prompt": "x"}, openai_line(3, prompt=long)]
    found = answered(model, tmp_path, [line | {"custom_id": str(n)} for n, line in enumerate(lines)], "answer_tokens=3")
    assert [answer["response"]["status_code"] for answer in found] == [200] * 4
    assert max(map(new_tokens, found)) == 3
    (tmp_path / "b").mkdir()
    (near_the_end,) = answered(model, tmp_path / "b", [openai_line(0, prompt=long)])
    assert new_tokens(near_the_end) == 4


def test_an_answer_may_be_as_long_as_the_model_has_positions(tmp_path: Path) -> None:
    """The help said so, and 1024 was the limit."""
    large = text_model(tmp_path / "ckpt", "llama", positions=2048)
    asked = [openai_line(0, prompt="x", max_tokens=1500, stop=list("aeiou"), temperature=1)]
    (answer,) = answered(large, tmp_path, asked)
    assert answer["response"]["status_code"] == 200


def test_what_every_line_would_be_refused_for_is_refused_first(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answered(model, tmp_path, [{"prompt": "x"}], "max_tokens=5000", status=2) == []
    assert "max_tokens = 5000: must be at most 128" in capsys.readouterr().err


def test_how_many_answers_a_line_may_ask_for_is_not_a_matter_of_its_neighbours(model: Path, tmp_path: Path) -> None:
    """The window, a tenth of the lines, was the limit: 128 answers were refused in a small file and given in a large
    one."""
    (answer,) = answered(model, tmp_path, [openai_line(0, prompt="x", n=128, max_tokens=1)])
    assert len(answer["response"]["body"]["choices"]) == 128


def test_messages_of_answers_may_be_sent_back() -> None:
    """OpenAI's clients append ``response.choices[0].message`` to a conversation: it has ``refusal: null``, which this
    project's own answers hold. Every second turn was refused."""
    answer = {"role": "assistant", "content": "a", "refusal": None, "annotations": [], "tool_calls": None}
    assert check_messages([USER, answer])[1] == {"role": "assistant", "content": "a"}
    for name, value in (("tool_calls", [{"id": "1"}]), ("refusal", "no"), ("tool_call_id", "1")):
        with pytest.raises(UserError, match=rf"messages\[1\]\.{name}"):
            check_messages([USER, answer | {name: value}])


def test_an_error_does_not_repeat_a_whole_line(tmp_path: Path) -> None:
    """A name of 100,000 characters came back three times in the line's answer; a line may have 64 MiB."""
    path = tmp_path / "in.jsonl"
    long = "x" * 100_000
    lines = [
        {"custom_id": [1] * 50_000, "prompt": "x"},
        {"custom_id": "a", "url": long, "body": {}},
        {"custom_id": "b", "url": "/v1/completions", "body": {}, long: 1},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    for line in lines_of([path]):
        with pytest.raises(RequestError) as caught:
            request_of(line, "m", {})
        assert len(json.dumps(caught.value.body())) < 1500
    assert RequestError("\ud800", "\ud800").message == "\\ud800"


def test_ends_of_lines_in_unicode_do_not_cut_an_answer(tmp_path: Path) -> None:
    """Python's splitlines, and clients that use it, took U+2028 and U+0085 of a text for the end of its line."""
    text = "a\u2028b\u2029c\x85d\x1ce\ud800é"
    (line,) = json_line({"text": text}).decode().splitlines()
    assert json.loads(line) == {"text": text}
    with OutputFile(tmp_path / "out.jsonl", {}, 1) as output:
        output.write(0, text, {"response": text})
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["custom_id"] == text


def test_answers_in_order_take_the_place_of_what_a_link_leads_to(tmp_path: Path) -> None:
    """The copy in order replaced the link itself, and lay on the disk that the link was to spare."""
    (tmp_path / "large").mkdir()
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "large" / "answers.jsonl")
    with OutputFile(tmp_path / "out.jsonl", {}, 2) as output:
        output.write(1, "b", {})
        output.write(0, "a", {})
        output.restore_order()
    assert (tmp_path / "out.jsonl").is_symlink()
    found = (tmp_path / "large" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["custom_id"] for line in found] == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "out.jsonl"]
    with pytest.raises(UserError, match="of the same job"):  # by its own name, too
        OutputFile(tmp_path / "large" / "answers.jsonl", {"another": 1}, 2)


def test_a_table_that_is_damaged_behind_its_head_is_named(tmp_path: Path) -> None:
    """It ended with pyarrow's traceback."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.table({"q": [f"prompt {i % 7}" for i in range(3000)]}), path, row_group_size=100)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3 : len(raw) // 3 + 50] = b"\xff" * 50
    path.write_bytes(raw)
    with pytest.raises(UserError, match="whose column q can be read"):
        list(lines_of([path], "q"))
