"""Predictions kept from one run to the next: a search for a policy takes seconds, tables ask for hundreds, and the same
is asked again and again.

One form of file in two places: ``results/predictions.json`` is shipped with the project, and only
``python -m flexgen_bench report`` writes it; what a user asks besides is kept in the cache directory. An answer is
found again only by everything that decides it: predictor, its constants and options, model, machine, job and limits,
and the code that predicts. After a change of any of these it is computed anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from flexgen_bench.core.codec import OMITTED, from_json, to_json
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.job import Job
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.status import Status

FILE = "predictions.json"
_VERSION = 3
MOST = 500  # answers in a user's file: the oldest go first
# What every predictor is made of.
_PACKAGE = Path(__file__).resolve().parents[1]
_SHARED = ("core", "planner", "schedule", "models")


@dataclass(frozen=True)
class Answer:
    """A prediction, or why there is none: ``status`` and ``reason``; of a job without room the tier, what it would need
    and what there is, in bytes.
    asked: the question in words, for readers of the file."""

    run: Prediction | None = field(default=None, metadata=OMITTED)
    status: Status = Status.OK
    reason: str = field(default="", metadata=OMITTED)
    tier: str = field(default="", metadata=OMITTED)
    need_bytes: int | None = field(default=None, metadata=OMITTED)
    capacity_bytes: int | None = field(default=None, metadata=OMITTED)
    asked: str = ""

    def __post_init__(self) -> None:
        if (self.run is None) == (self.status is Status.OK):
            raise UserError("answer.status", self.status, "ok with a run, and only with one")


def key_of(predictor: str, constants: Mapping[str, float], options: Mapping[str, Any], job: Job) -> str:
    """What an answer is found by: the job, who is asked and what it is told besides, and its code. Where a
    machine's constants come from decides nothing, nor in which words its memory was asked for, and an option that is
    None is for the predictor to choose, as one that is left out."""
    machine = replace(job.hardware, sources={}, weight_shares={})
    facts_of_job = to_json(replace(job, hardware=machine))
    stated = {name: to_json(value) for name, value in options.items() if value is not None}
    deciding = [predictor, dict(constants), stated, facts_of_job, code_of(predictor)]
    facts = json.dumps(deciding, sort_keys=True, default=str)
    return hashlib.sha256(facts.encode()).hexdigest()[:24]


def load(path: Path) -> dict[str, Answer]:
    """The answers in a file; none if there is no file. Raises StoreError naming the file if it cannot be read, or holds
    something else."""
    try:
        if not path.exists():
            return {}
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema_version"] != _VERSION:
            raise ValueError(f"schema version {data['schema_version']}")
        return {key: _answer(stored, key) for key, stored in data["answers"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise StoreError(f"{path} does not hold predictions ({reason})") from error


def text_of(answers: Mapping[str, Answer]) -> str:
    """The text of a shipped file, an answer a line: the same answers give the same bytes."""
    ordered = sorted(answers.items(), key=lambda one: (one[1].asked, one[0]))
    return _text(ordered)


def as_read_back(answer: Answer) -> Answer:
    """The answer as it is read back, so that what is kept and what is new look the same."""
    return _answer(json.loads(_line(answer)), "answer")


@dataclass
class KeptPredictions:
    """The answers that are shipped, and the user's own in the file ``own``. notify: gets a line about a file that is
    damaged or cannot be written; neither is more than a loss of time."""

    shipped: Path
    own: Path
    notify: Callable[[str], None] = field(repr=False)

    def find(self, key: str) -> Answer | None:
        return self._shipped.get(key) or self._own.get(key)

    def keep(self, new: Mapping[str, Answer]) -> None:
        """Add to the user's file. Another process may do so at the same time: then one of the two will have to ask
        again."""
        if not new:
            return
        self._own.update(new)
        newest = list(self._own.items())[-MOST:]
        temporary = self.own.with_name(f".{self.own.name}.{os.getpid()}.tmp")
        try:
            self.own.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(_text(newest), encoding="utf-8", newline="\n")
            temporary.replace(self.own)
        except OSError as error:
            self.notify(f"predictions are not kept: {self.own}: {error.strerror or error}")
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    @cached_property
    def _shipped(self) -> dict[str, Answer]:
        return self._loaded(self.shipped)

    @cached_property
    def _own(self) -> dict[str, Answer]:
        return self._loaded(self.own)

    def _loaded(self, path: Path) -> dict[str, Answer]:
        try:
            return load(path)
        except StoreError as error:
            self.notify(f"warning: {error}; what it kept is predicted anew")
            return {}


def _text(answers: Iterable[tuple[str, Answer]]) -> str:
    body = ",\n".join(f" {json.dumps(key)}: {_line(answer)}" for key, answer in answers)
    return f'{{"schema_version": {_VERSION}, "answers": {{\n{body}\n}}}}\n'


def _line(answer: Answer) -> str:
    """What people look for comes first. An option that JSON has no form for is written as text."""
    first = {"asked": answer.asked, "status": answer.status.value}
    return json.dumps(first | to_json(answer), allow_nan=False, default=str)


def _answer(stored: Any, at: str) -> Answer:
    """Raises UserError for what is no answer, or no prediction's figures."""
    answer = from_json(Answer, stored, at, complete=True)
    run = answer.run
    if run is not None:
        counts = (run.num_prompts, run.prompt_len, run.gen_len, run.batch_size)
        if min(counts) < 1 or min(run.prefill_s, run.decode_s) < 0 or run.total_s <= 0:
            raise UserError(f"{at}.run", counts, "positive counts and times")
    return answer


@cache
def code_of(predictor: str) -> str:
    """Of the files that a predictor may be made of: its top-level package, or of ours the parts that predict."""
    top = predictor.partition(":")[0].partition(".")[0]
    files = [f for part in _SHARED for f in (_PACKAGE / part).rglob("*.py")]
    spec = None if top == _PACKAGE.name else importlib.util.find_spec(top)
    if spec is not None:
        folders = [Path(f) for f in spec.submodule_search_locations or ()]
        files += [f for folder in folders for f in folder.rglob("*.py")]
        files += [Path(spec.origin)] if not folders and spec.origin else []
    digest = hashlib.sha256()
    for name, file in sorted((f.name, f) for f in set(files)):
        digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
