"""A chat in a terminal, or over a pipe: lines in, words out."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from flexgen_bench.chat.commands import COMMANDS, is_command, run_command
from flexgen_bench.chat.conversation import Conversation
from flexgen_bench.core.errors import UserError

PROMPT, MORE = "> ", ". "
ReadLine = Callable[[str], str]  # given a prompt; EOFError at the end, KeyboardInterrupt for Ctrl-C


def chat(conversation: Conversation, read: ReadLine, out: IO[str] | None = None) -> None:
    """Until the user ends it. Ctrl-C ends an answer, or throws away the line that is written, never the program."""
    out = out or sys.stdout

    def say(text: str, end: str = "\n") -> None:
        print(text, end=end, file=out, flush=True)

    while True:
        try:
            text = _read_turn(read)
        except KeyboardInterrupt:
            say("(/quit or Ctrl-D ends the chat)")
            continue
        except EOFError:
            return
        if not text.strip():
            continue
        try:
            if is_command(text):
                said = run_command(text.strip(), conversation)
                if said is None:
                    return
                say(said)
            else:
                _answer(conversation, text, say)
        except UserError as error:
            say(f"error: {error}")


def _answer(conversation: Conversation, text: str, say: Callable[..., None]) -> None:
    answer = conversation.say(text)
    try:
        with _counted_interrupts() as interrupts:
            for piece in answer:
                say(piece, end="")
                if interrupts:
                    say("\n(ended)", end="")
                    break
        say("")
    except KeyboardInterrupt:
        say("\n(broken off: what was kept of the conversation will be computed again)")
    finally:
        answer.close()  # type: ignore[attr-defined]


@contextmanager
def _counted_interrupts() -> Iterator[list[int]]:
    """Ctrl-C waits for the end of a pass, so that what is computed stays; the second one does not."""
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _read_turn(read: ReadLine) -> str:
    """One turn: lines that end with a backslash go on in the next, if there is one."""
    lines = [read(PROMPT)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(read(MORE))
        except EOFError:
            break  # what is written is a turn, and the end comes with the next one
    return "\n".join(lines)


def terminal_reader() -> ReadLine:
    """Lines with editing, history and completion of commands. ImportError without prompt-toolkit."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import InMemoryHistory

    session: Any = PromptSession(
        history=InMemoryHistory(), completer=WordCompleter(list(COMMANDS), sentence=True), complete_while_typing=False
    )
    return lambda prompt: str(session.prompt(prompt))


def pipe_reader() -> ReadLine:
    """Lines of standard input, without prompts. A line that is no UTF-8 is refused as a turn, and the next one is
    read."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")

    def read(prompt: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")

    return read
