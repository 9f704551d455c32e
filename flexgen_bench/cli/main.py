"""``flexgen-bench COMMAND ...``, which is also ``python -m flexgen_bench COMMAND ...``. Without a command: ``run``.

A command is a file of this folder with a ``main(arguments) -> exit status``; to add one is to write it and to name it
here.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from flexgen_bench import __version__
from flexgen_bench.cli.ending import BAD_INPUT

COMMANDS = {
    "run": "measure cells on this machine, or simulate another one (what happens without a command)",
    "plan": "what a run would do: policy and why, memory, time, disk; runs nothing",
    "batch": "answer files of requests; a killed run goes on where it was",
    "chat": "talk to a model in the terminal",
    "serve": "an HTTP server in the form of the OpenAI API",
    "dashboard": "the saved view and report of what tracker=wandb has sent, or how to make them by hand",
    "trace": "what every lane did in a recorded run",
    "picture": "draw what records say: speed against latency, memory, price, accuracy, prediction",
    "page": "every record in one folder that a browser opens from disk, or live while a suite runs",
    "report": "rebuild tables, pages and the paper's tables from the records",
    "compare": "whether B is better or worse than A: commits, folders, records; measured again in turns if asked",
    "calibrate": "measure what this machine sustains",
    "fetch": "put trained models and data of accuracy tasks into the cache",
    "accuracy": "what compression costs a model, on tasks",
    "importance": "measure how large the inputs of each weight matrix are, for calibrated scales",
    "lm-eval": "lm-eval's own command line with this project's systems as models",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: ``sys.argv``); the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal cannot show ends no command
        sys.stdout.reconfigure(errors="backslashreplace")
    if words[:1] == ["--version"]:
        print(f"flexgen-bench {__version__}")
        return 0
    if words[:1] == ["help"]:
        print(usage())
        return 0
    # Overrides hold an equals sign or begin with a sign of their own, so a plain word can only mean a command.
    if words and words[0].replace("-", "").isalpha() and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            print(f"error: there is no command {name!r}.{hint}\n\n{usage()}", file=sys.stderr)
            return BAD_INPUT
    else:
        name = "run"
    module = import_module(f"flexgen_bench.cli.{name.replace('-', '_')}")
    return int(module.main(words))


def usage() -> str:
    """The commands, one a line."""
    lines = [f"  {name:<11} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "Usage: flexgen-bench [COMMAND] [arguments]",
            "",
            *lines,
            "",
            "flexgen-bench COMMAND --help says more of one; flexgen-bench --help of runs and their configuration.",
        ]
    )
