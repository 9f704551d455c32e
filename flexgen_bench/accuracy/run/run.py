"""A run: every task under every mode, each saved as soon as it is done; then what a mode does to the model's
numbers."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from flexgen_bench.accuracy.run.evaluate import check_metric, evaluate_task, quiet
from flexgen_bench.accuracy.run.identity import mode_key, model_fingerprint, task_key
from flexgen_bench.accuracy.run.models import Setup, dtype_of, opened, rounded_weights
from flexgen_bench.accuracy.run.numbers import NumbersOf, loss_text, plain_text, text_hash
from flexgen_bench.accuracy.run.options import EXACT_REFERENCE, USUAL_LIMIT, YARDSTICK, Request
from flexgen_bench.checkpoints.gguf.rounding import check_format
from flexgen_bench.config.build import system_target
from flexgen_bench.core.accuracy import Role, Subject, TaskRecord
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.model import DType
from flexgen_bench.llm.model_source import checkpoint_of
from flexgen_bench.machine.environment import describe_environment
from flexgen_bench.store.accuracy_store import find_mode, find_task, write_accuracy
from flexgen_bench.systems.load_system import load_target

# What a person is told while it runs.
Notify = Callable[[str], None]
_COMMAND = "python -m flexgen_bench accuracy"
# Folders of what modes are compared with; the number of the process follows.
_DISTRIBUTIONS = "distributions-"
# A limit that no task reaches.
_ALL = 10**9


@dataclass(frozen=True)
class RequestedTask:
    """A task that is there and can be compared. data: hashes of its splits."""

    name: str
    version: str
    data: Mapping[str, str]
    metric: str
    items: int
    task: Any


@dataclass(frozen=True)
class Todo:
    """One system under one mode: which tasks have no record yet, and whether the numbers have one."""

    setup: Setup
    subject: Subject
    done: Sequence[str]
    missing: Sequence[RequestedTask]
    numbers_missing: bool


class AccuracyRun:
    """Everything is checked when this is made; nothing has run then."""

    def __init__(self, request: Request, notify: Notify) -> None:
        self._request, self._notify = request, notify
        self.setups = _setups(request, notify)
        self._limit = _limit(request)
        self.tasks = requested_tasks(request, self._limit)
        self._folders: dict[str, Path] = {}
        for setup in self.setups:
            if setup.mode.weight_format is not None:
                check_format(self._folder(setup), setup.mode.weight_format, DType(dtype_of(setup, request)))

    def todo(self) -> list[Todo]:
        """What there is to do, in order: the uncompressed model first."""
        todos = []
        for setup in self.setups:
            subject = self._subject(setup)
            done = (
                []
                if self._request.rerun
                else [
                    t.name
                    for t in self.tasks
                    if find_task(self._request.results_dir, subject.model, self._key(subject, t), t.items) is not None
                ]
            )
            missing = [t for t in self.tasks if t.name not in done]
            todos.append(Todo(setup, subject, done, missing, self._numbers_missing(setup, subject)))
        return todos

    def keys(self) -> set[str]:
        """Of all records that this run is about."""
        subjects = [self._subject(setup) for setup in self.setups]
        tasks = {self._key(subject, task) for subject in subjects for task in self.tasks}
        return tasks | {self._numbers_key(subject) for subject in subjects}

    def execute(self) -> list[Path]:
        """Run what is missing; the paths of new records. Each record is on the disk before the next task begins."""
        written = []
        scratch = self._request.cache / "accuracy"
        scratch.mkdir(parents=True, exist_ok=True)
        _remove_orphans(scratch)
        with tempfile.TemporaryDirectory(prefix=f"{_DISTRIBUTIONS}{os.getpid()}-", dir=scratch) as folder:
            numbers = NumbersOf(self._request, Path(folder))
            todo = self.todo()
            exact_is_needed = any(t.numbers_missing for t in todo)
            for one in todo:
                compares = one.setup == self.setups[0] and exact_is_needed
                if one.missing or one.numbers_missing or compares:
                    written += self._one(one, numbers, compares=compares)
        return written

    def _one(self, todo: Todo, numbers: NumbersOf, *, compares: bool) -> list[Path]:
        folder = self._folder(todo.setup)
        rounded = rounded_weights(todo.setup, todo.subject, self._request.cache, folder)
        if rounded is not None:
            folder = rounded.folder
        written = []
        name = f"{todo.setup.system}, {todo.setup.mode.name}"
        self._notify(f"{name}: {todo.setup.mode.title}")
        with opened(todo.setup, self._request, folder) as lm:
            if compares:
                numbers.keep_exact(lm)
            for number, task in enumerate(todo.missing, start=1):
                self._notify(f"{name}: {task.name}, {task.items} items ({number} of {len(todo.missing)})")
                written.append(self._task(lm, todo, task))
            if todo.numbers_missing:
                self._notify(f"{name}: what it does to weights, cache and distributions")
                key = self._numbers_key(todo.subject)
                record = numbers.of(lm, todo.subject, todo.setup.lossy, folder, key, self.command, rounded)
                written.append(write_accuracy(record, self._request.results_dir))
        return written

    def _task(self, lm: Any, todo: Todo, task: RequestedTask) -> Path:
        key = self._key(todo.subject, task)
        commit = str((self._environment["code"] or {}).get("commit"))[:12]
        answers = self._request.cache / "accuracy" / "answers" / f"{key}-{commit}" / "answers"
        if self._request.rerun:
            shutil.rmtree(answers.parent, ignore_errors=True)
        begin = _now()
        done = evaluate_task(lm, task.name, task.task, task.metric, answers)
        for item, why in done.left_out.items():
            self._notify(f"{task.name}: item {item} cannot be scored and is left out: {why}")
        record = TaskRecord(
            run_id=_run_id(),
            key=key,
            subject=todo.subject,
            task=task.name,
            task_version=task.version,
            data_sha256=dict(task.data),
            metric=task.metric,
            statistic=done.statistic,
            higher_is_better=done.higher_is_better,
            limit=None if self._limit == _ALL else self._limit,
            truncated=done.truncated,
            left_out=done.left_out,
            scores=done.scores,
            items=done.items,
            started_utc=begin,
            ended_utc=_now(),
            seconds=done.seconds,
            rerun_command=self.command,
            environment=self._environment,
        )
        path = write_accuracy(record, self._request.results_dir)
        shutil.rmtree(answers.parent, ignore_errors=True)  # the record holds them now
        return path

    @cached_property
    def command(self) -> str:
        """What to type to do this again."""
        import shlex

        return f"{_COMMAND} {shlex.join([*self._request.overrides, 'rerun=true'])}"

    @cached_property
    def _environment(self) -> Mapping[str, Any]:
        return describe_environment(self._request.cache, self._request.results_dir, dict(os.environ))

    def _folder(self, setup: Setup) -> Path:
        dtype = dtype_of(setup, self._request)
        if dtype not in self._folders:
            folder, _ = checkpoint_of(self._request.source, dtype, self._request.cache, lambda what, done, total: None)
            self._folders[dtype] = folder
        return self._folders[dtype]

    def _subject(self, setup: Setup) -> Subject:
        return Subject(
            model=self._request.model,
            fingerprint=model_fingerprint(self._request.source, lambda: self._folder(setup)),
            system=setup.system,
            mode=setup.mode.name,
            lossy=to_json(setup.lossy),
            dtype=dtype_of(setup, self._request),
            run_dtype=self._request.dtype,
            role=setup.role,
            weight_format=setup.mode.weight_format,
        )

    def _key(self, subject: Subject, task: RequestedTask) -> str:
        return task_key(subject, task.name, task.version, task.data, task.metric, self._request.max_length)

    def _numbers_key(self, subject: Subject) -> str:
        request = self._request
        text, of_loss = text_hash(plain_text()), text_hash(loss_text(request))
        return mode_key(subject, text, request.text_tokens, of_loss, request.loss_tokens)

    def _numbers_missing(self, setup: Setup, subject: Subject) -> bool:
        if setup.role is not Role.EVALUATED or setup.mode.is_reference:
            return False
        stored = find_mode(self._request.results_dir, subject.model, self._numbers_key(subject))
        return self._request.rerun or stored is None


def _limit(request: Request) -> int:
    from flexgen_bench.accuracy.data.tasks import set_limit

    if request.limit is None:
        return _ALL
    if isinstance(request.limit, int):
        return request.limit
    return set_limit(request.tasks) or USUAL_LIMIT


def requested_tasks(request: Request, limit: int) -> list[RequestedTask]:
    """Every task of the request, loaded and checked. Raises UserError or StoreError for the first that cannot be had or
    compared."""
    from flexgen_bench.accuracy.data.task_conf import read_tasks
    from flexgen_bench.accuracy.data.tasks import load_tasks

    with quiet():
        loaded = load_tasks(request.tasks, limit, request.cache)
    specs = read_tasks()
    tasks = []
    for name, task in loaded.items():
        spec = specs[name]
        check_metric(name, task, spec.primary_metric)
        data = {split: s.sha256 for split, s in spec.splits.items()}
        tasks.append(RequestedTask(name, str(spec.version), data, spec.primary_metric, len(task.eval_docs), task))
    if not tasks:
        raise UserError("tasks", list(request.tasks), "at least one task")
    return tasks


def _setups(request: Request, notify: Notify) -> list[Setup]:
    """The uncompressed system first, then its modes, then what they are measured against."""
    able = load_target(system_target(request.system)).capabilities
    if not able.scores:
        raise UserError("system", request.system, "a system that gives log-likelihoods")
    for mode in request.modes:
        refused = [name for name in mode.lossy.changed if name not in able.lossy]
        if refused:
            raise UserError(
                "mode", mode.name, f"one that {request.system} can follow", f"It cannot change {', '.join(refused)}."
            )
    role = _role(request.system)
    setups = [Setup(request.system, mode, role) for mode in (request.exact, *request.modes)]
    if request.reference not in (EXACT_REFERENCE, YARDSTICK, request.system):
        setups.append(Setup(request.reference, request.exact, _role(request.reference)))
    if request.reference == YARDSTICK:
        for mode in request.modes:
            lossy = mode.lossy
            if lossy.weights is None or lossy.kv_cache is not None or lossy.value_share < 1:
                notify(f"mode {mode.name}: no yardstick, it does more than compress weights")
                continue
            setups.append(Setup(YARDSTICK, mode, Role.YARDSTICK))
    return setups


def _role(system: str) -> Role:
    is_reference = load_target(system_target(system)).capabilities.reference
    return Role.REFERENCE if is_reference else Role.EVALUATED


def _remove_orphans(scratch: Path) -> None:
    """Distributions (some 200 MB) that runs have left which were killed."""
    for folder in scratch.glob(f"{_DISTRIBUTIONS}*"):
        process = folder.name.removeprefix(_DISTRIBUTIONS).partition("-")[0]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _run_id() -> str:
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid4().hex[:8]}"
