"""``flexgen-bench chat model=smollm2``: talk to a model.

What is needed is downloaded and converted first. Exit status: 0 after /quit or the end of the input, 1 if something
went wrong, 2 for bad input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flexgen_bench.cli.ending import status_of
from flexgen_bench.cli.model_words import check_words, divided, number, open_llm, words_help
from flexgen_bench.core.errors import CannotRun, NotFinite, StoreError, UserError
from flexgen_bench.core.extras import how_to_install
from flexgen_bench.core.tiers import Tier
from flexgen_bench.core.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from flexgen_bench.core.progress import Progress
    from flexgen_bench.llm.llm import LLM
    from flexgen_bench.schedule.sequence_groups import Capacity

_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
_DEFAULTS = {"max_tokens": 512, "temperature": 0.0}
_CONTEXT = 4096

_EPILOG = f"""\
words:
{words_help()}
  {"context=":<17} most tokens of a conversation (default: {_CONTEXT}, or what the model has)
  {"max_tokens=":<17} of an answer (default: {_DEFAULTS["max_tokens"]}, or a quarter of the context)
  of answers: {", ".join(f"{key}=" for key in _SAMPLING[1:])} (default: greedy)

In the chat: /help. Ctrl-C ends an answer, Ctrl-D the chat.
"""


def main(arguments: Sequence[str]) -> int:
    """The exit status."""
    return status_of(lambda: _command(arguments), (StoreError, CannotRun, NotFinite), interrupted="")


def _command(arguments: Sequence[str]) -> int:
    others, words = divided(arguments)
    options = _parser().parse_args(others)
    check_words(words, (*_SAMPLING, "context"))
    return _run(words, options.system)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flexgen-bench chat",
        description="Talk to a model; earlier turns are kept and not computed again.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told first")
    return parser


def _run(words: Mapping[str, str], system: str) -> int:
    from flexgen_bench.chat.conversation import Conversation, capacity_of
    from flexgen_bench.chat.terminal import chat, pipe_reader, terminal_reader
    from flexgen_bench.core.sampling_params import SamplingParams
    from flexgen_bench.requests.chat_template import encode_chat

    given: dict[str, Any] = {key: number(words[key]) for key in _SAMPLING if key in words}
    if sys.stdin.isatty():
        try:
            read = terminal_reader()
        except ImportError as error:
            raise CannotRun(how_to_install("prompt-toolkit")) from error
    else:
        read = pipe_reader()
    with _bars() as show:
        llm = open_llm(words, show)
    with llm:
        llm.check_open_jobs()
        encode_chat(llm.tokenizer, [{"role": "user", "content": "?"}])  # refuses a model that cannot chat, now
        context = _context(words, llm)
        params = SamplingParams(**{**_DEFAULTS, "max_tokens": min(512, max(1, context // 4)), **given})
        capacity = capacity_of(llm, params, context)
        print(_expectation(llm, capacity), file=sys.stderr, flush=True)
        with Conversation(llm, params, capacity, system) as conversation:
            chat(conversation, read)
    return 0


def _context(words: Mapping[str, str], llm: LLM) -> int:
    if "context" not in words:
        return min(_CONTEXT, llm.shape.max_positions)
    context = number(words["context"])
    if not isinstance(context, int):
        raise UserError("context", words["context"], "an integer")
    return context


def _expectation(llm: LLM, capacity: Capacity) -> str:
    """What the model takes and how fast it will be, as far as that can be said."""
    from flexgen_bench.schedule.sequence_groups import Request

    plan = llm.plan(capacity)
    memory = ", ".join(f"{tier} {format_bytes(plan.total(tier))}" for tier in Tier if plan.total(tier))
    said = f"{llm.shape.name}: {memory}; {capacity.prompt_len + capacity.gen_len - 1} tokens of context"
    try:
        first = llm.predicted_seconds([Request(64, 1)])
        others = llm.predicted_seconds([Request(64, 9)]) - first
    except UserError:
        return f"{said}; how fast nobody knows (flexgen-bench calibrate measures this machine). /help"
    return (
        f"{said}; a first word after about {format_seconds(first)}, then {8 / others:.2g} tokens/s [SIMULATED]. /help"
    )


@contextmanager
def _bars() -> Iterator[Progress]:
    """Bars of what is downloaded and converted; generation shows itself."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True, highlight=False)
    with Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what in ("prefill", "decode"):
                return
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show
