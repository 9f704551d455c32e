"""``python -m flexgen_bench accuracy model=... tasks=... mode=...``: what a mode costs a model, measured through the
engine.

Exit status: 0 if every task was evaluated and every control holds, 1 if one does not or something went wrong on the
way, 2 for bad input (named before anything runs), 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flexgen_bench.accuracy.run.modes import list_modes, load_mode
from flexgen_bench.accuracy.run.needs import check_installed
from flexgen_bench.accuracy.run.options import AccuracyConf, Request, to_request
from flexgen_bench.cells.compose import composed_as
from flexgen_bench.cells.words import check_groups
from flexgen_bench.cli.ending import FAILED, status_of
from flexgen_bench.config.overrides import quoted, readable, text_of
from flexgen_bench.config.paths import list_models
from flexgen_bench.core.errors import CannotRun, StoreError, UserError
from flexgen_bench.core.folders import is_gguf, make_writable

if TYPE_CHECKING:
    from flexgen_bench.accuracy.compare.outcome import ModelOutcome
    from flexgen_bench.accuracy.run.run import AccuracyRun
    from flexgen_bench.trackers.base import Tracker

CONFIG = "accuracy_run"

_USAGE = """\
flexgen-bench accuracy: what compression and sparse attention cost a model, item by item, through the same engine.

Usage: python -m flexgen_bench accuracy [key=value ...]

Typical commands
  python -m flexgen_bench accuracy model=smollm2-135m tasks=ci mode=w4
                                    a few minutes: one mode beside the uncompressed model
  python -m flexgen_bench accuracy model=smollm2-135m tasks=helm mode=[w8,w4,w3,kv4,w4kv4] reference=yardstick
                                    several modes, each beside plain rounding of the same weights
  python -m flexgen_bench accuracy model=/path/to/checkpoint tasks=[lambada,boolq] mode=w4 limit=null
                                    a checkpoint of your own, all items
  python -m flexgen_bench accuracy model=opt-30b weights=hub dtype=float16 tasks=paper mode=[w4kv4,w4kv4-sparse]
                                    a column of the paper's Table 5
  python -m flexgen_bench accuracy tasks=helm dry_run=true
                                    is everything there? what would be done? runs nothing

Results go to results/accuracy; what is recorded already is not run again, and a run that was killed goes on at the item
where it stopped. python -m flexgen_bench report makes pages from them.
"""
_KEYS = """\
Keys (with their defaults)
  model=smollm2-135m      a model of conf/model, a checkpoint folder, a .gguf file or a hub id
                          (weights=, location= as everywhere)
  tasks=helm              sets and tasks, several in brackets: [lambada,boolq]
  mode=w4                 modes, several in brackets; the uncompressed model is always evaluated with them
  reference=exact         yardstick: beside plain rounding too; a system (transformers): beside its uncompressed results
                          too
  limit=auto              items of each task: what a set asks for, else 500; null: all
  dtype=float32           of what is not compressed
  margin.score=0.02       a loss up to this counts as none (0.02: two points of accuracy);
                          margin.bits=0.02: bits per byte
  text_tokens=1024        of plain text, to compare distributions on; 0: none
  loss_tokens=4096        of text, to tell the loss in llama.cpp's words; loss_text=FILE: your own (wiki.test.raw)
  system=flexgen gpu=auto policy=auto threads=null batch_size=null max_length=null
  rerun=false dry_run=false results_dir=results cache_dir=null
  tracker=none            wandb: also to Weights & Biases, a run for each mode
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if any(word in ("-h", "--help") for word in given):
        print(_help())
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars, which say little in a log
    interrupted = "interrupted; what is done is kept, the same command goes on with it"
    return status_of(lambda: _run(to_request(*_composed(given))), (StoreError, CannotRun), interrupted)


def _composed(given: Sequence[str]) -> tuple[AccuracyConf, tuple[str, ...]]:
    """Raises UserError for what is no override, and for unknown groups and keys."""
    for word in given:
        if word.startswith("-") or "=" not in word:
            raise UserError("command line", word, "key=value", "--help lists the keys.")
    words = readable([_checkpoint(word) for word in given], AccuracyConf)
    check_groups(words)
    conf: AccuracyConf = composed_as(CONFIG, AccuracyConf, words)
    return conf, tuple(given)


def _checkpoint(word: str) -> str:
    """``model=/path`` and ``model=owner/name`` name a checkpoint, not one of conf/model."""
    key, _, value = word.partition("=")
    named = text_of(value)
    is_place = "/" in named or is_gguf(named) or os.path.isdir(named)
    return f"checkpoint={quoted(named)}" if key == "model" and is_place else word


def _run(request: Request) -> int:
    from flexgen_bench.accuracy.compare.outcome import outcomes
    from flexgen_bench.accuracy.run.run import AccuracyRun
    from flexgen_bench.report.accuracy.text import print_outcome
    from flexgen_bench.store.accuracy_store import read_accuracy
    from flexgen_bench.trackers.registry import make_tracker

    check_installed()
    make_writable(request.cache, "cache_dir")
    run = AccuracyRun(request, _tell)
    if request.dry_run:
        _show(run)
        return 0
    make_writable(request.results_dir, "results_dir")
    tracker = make_tracker(request.tracker.name, request.tracker.options(), request.results_dir)
    written = run.execute()
    stored = read_accuracy(request.results_dir, run.keys())
    all_outcomes = outcomes(stored, request.margins)
    if tracker is not None:
        _track(tracker, request, all_outcomes)
    for outcome in all_outcomes:
        print_outcome(outcome)
    for problem in stored.problems:
        print(f"not used: {problem.message}", file=sys.stderr)
    failed = [f for outcome in all_outcomes for f in outcome.findings if f.fails]
    for finding in failed:
        print(f"error: {finding.mode}: {finding.name}: {finding.text}", file=sys.stderr)
    print(
        json.dumps(
            {
                "records": [str(path) for path in written],
                "controls": "failed" if failed else "hold",
                "recommended": {f"{o.model} ({o.dtype})": o.recommendation.mode for o in all_outcomes},
            }
        )
    )
    return FAILED if failed else 0


def _track(tracker: Tracker, request: Request, all_outcomes: Sequence[ModelOutcome]) -> None:
    """Send the modes to a tracker. The records are saved: that it fails is told."""
    from flexgen_bench.trackers.accuracy_run import send_accuracy

    try:
        send_accuracy(tracker, all_outcomes, request.results_dir)
    except Exception as error:
        _tell(f"tracker {request.tracker.name} failed: {error!r}. The records are saved.")
    finally:
        tracker.close()


def _show(run: AccuracyRun) -> None:
    """What would be done, on standard output."""
    for todo in run.todo():
        items = sum(task.items for task in todo.missing)
        print(f"{todo.setup.system}, {todo.setup.mode.name} ({todo.setup.mode.title}; {todo.subject.dtype})")
        print(f"  to do: {len(todo.missing)} tasks, {items} items; recorded: {len(todo.done)} tasks")
        for task in todo.missing:
            print(f"    {task.name}: {task.items} items, {task.metric}, version {task.version}")
        if todo.numbers_missing:
            print("    what it does to weights, cache and distributions")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _help() -> str:
    from flexgen_bench.accuracy.data.task_conf import read_sets, read_tasks

    def line(name: str, what: str) -> str:
        return f"  {name:<18}{what}"

    sets: Any = read_sets()
    specs = read_tasks()
    tasks = sorted(name for name in specs if specs[name].data_name == name)
    variants = sorted({s.data_name for name, s in specs.items() if s.data_name != name})
    parts = [
        _USAGE,
        _KEYS,
        "Modes",
        *(line(name, load_mode(name).title) for name in list_modes()),
        "",
        "Sets of tasks",
        *(line(name, sets[name].description) for name in sorted(sets)),
        "",
        f"Tasks: {', '.join(tasks)}",
        *(f"       {name}_<subject>: one of its subjects alone" for name in variants),
        "",
        f"Models: {', '.join(list_models())}",
    ]
    return "\n".join(parts)
