"""Chats: turns that are not computed again, commands, ends of answers; a real process that is interrupted."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgen_bench import LLM, SamplingParams
from flexgen_bench.chat.conversation import Conversation, capacity_of
from flexgen_bench.chat.terminal import chat
from flexgen_bench.cli import chat as command
from flexgen_bench.core.errors import UserError
from tests.support.documented import ROOT
from tests.support.tiny_text_models import CHAT_TEMPLATE, text_model

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    return text_model(folder / "ckpt", "llama", positions=512, chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, cache_dir=model.parent / "cache", threads=1, gpu="cpu") as made:
        yield made


@pytest.fixture
def conversation(llm: LLM) -> Iterator[Conversation]:
    with Conversation(llm, PARAMS, capacity_of(llm, PARAMS, 300), "Be brief.") as made:
        yield made


def test_turns_are_those_of_the_whole_conversation_alone(llm: LLM, conversation: Conversation) -> None:
    for text in ("Hi", "And then?", "äöü", "x" * 40):
        "".join(conversation.say(text))
    conversation.close()
    asked = [conversation.messages[: 2 + 2 * n] for n in range(4)]
    expected = [output.text for output in llm.chat(asked, PARAMS)]
    assert [m["content"] for m in conversation.messages[2::2]] == expected


def test_earlier_turns_are_kept(conversation: Conversation) -> None:
    """The second turn computes its own text, the template's words, and the answer's last token."""
    list(conversation.say("Hi"))
    list(conversation.say("Go on"))
    first, second = conversation.stats
    assert conversation.keeps
    assert first.kept_tokens == 0
    assert second.kept_tokens >= first.prompt_tokens
    # An answer of random bytes is no text that tokenizes back to itself; what stands before it is kept in any case.
    assert second.prompt_tokens - second.kept_tokens < second.prompt_tokens / 2 + 40


def test_reading_no_further_ends_an_answer(llm: LLM, conversation: Conversation) -> None:
    answer = conversation.say("Hi")
    pieces = [next(answer), next(answer), next(answer)]
    answer.close()  # type: ignore[attr-defined]
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    again = "".join(conversation.say("More"))
    messages = conversation.messages[:-1]
    conversation.close()
    assert llm.chat(messages, PARAMS)[0].text == again


def test_a_conversation_that_is_too_long_is_refused_and_stays(conversation: Conversation) -> None:
    list(conversation.say("Hi"))
    before = list(conversation.messages)
    with pytest.raises(UserError, match="/reset"):
        conversation.say("x" * 400)
    assert conversation.messages == before
    conversation.reset()
    assert conversation.messages == before[:1]
    list(conversation.say("Hi"))
    assert conversation.messages == before


def test_lines_of_a_chat(conversation: Conversation, tmp_path: Path) -> None:
    file = tmp_path / "saved.json"
    lines = iter(
        ["Hi", "", "two\\", "lines", "/stats", f"/save {file}", f"/save {file}", "/system X", "/bye", "/help", "/quit"]
    )
    out = io.StringIO()
    chat(conversation, lambda prompt: next(lines), out)
    said = out.getvalue()
    assert said.count("first word after") == 2
    saved = json.loads(file.read_text())
    assert [m["content"] for m in saved["messages"][1::2]] == ["Hi", "two\nlines"]
    assert "Nothing is overwritten" in said
    assert "must be one of" in said
    assert "/reset" in said
    assert conversation.messages == [{"role": "system", "content": "X"}]


def test_the_end_of_the_input_ends_a_turn_that_was_to_go_on(conversation: Conversation) -> None:
    """``printf 'Hi \\\\' | flexgen-bench chat`` ended without an answer."""
    lines = iter(["Hi\\"])

    def read(prompt: str) -> str:
        for line in lines:
            return line
        raise EOFError

    chat(conversation, read, io.StringIO())
    assert [m["role"] for m in conversation.messages if m["role"] != "system"] == ["user", "assistant"]
    assert conversation.messages[-2]["content"] == "Hi"


def test_ctrl_c_while_nothing_is_computed_throws_the_line_away(conversation: Conversation) -> None:
    def read(prompt: str, calls: list[int] = [0]) -> str:  # noqa: B006
        calls[0] += 1
        raise KeyboardInterrupt if calls[0] == 1 else EOFError

    out = io.StringIO()
    chat(conversation, read, out)
    assert "/quit" in out.getvalue()


def test_ctrl_c_ends_an_answer_and_not_the_program(model: Path) -> None:
    """A real process, over pipes: an answer that would be long is interrupted, the next turn is answered."""
    words = [f"model={model}", "gpu=cpu", "threads=1", f"cache_dir={model.parent / 'cache'}", "max_tokens=400"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flexgen_bench", "chat", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(b"\xef\xbb\xbf\xff\xfe\n")  # no text: said, and the next line is read
        process.stdin.write(b"Hi\n")
        process.stdin.flush()
        assert b"UTF-8" in process.stdout.readline()
        assert process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        process.stdin.write(b"/stats\n/quit\n")
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert b"(ended)" in out
    assert b"first word after" in out
    assert b"tokens of context" in err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["context=9999"], "context"),
        (["context=x"], "context"),
        (["max_tokens=0"], "max_tokens"),
        (["colour=1"], "colour"),
    ],
)
def test_what_cannot_be_is_named(
    words: list[str], named: str, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    given = [f"model={model}", "gpu=cpu", "threads=1", f"cache_dir={model.parent / 'cache'}"]
    assert command.main([*given, *words]) == 2
    assert named in capsys.readouterr().err


def test_a_model_without_a_template_cannot_chat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    words = [f"model={text_model(tmp_path / 'ckpt')}", "gpu=cpu", f"cache_dir={tmp_path / 'cache'}"]
    assert command.main(words) == 2
    assert "chat template" in capsys.readouterr().err
