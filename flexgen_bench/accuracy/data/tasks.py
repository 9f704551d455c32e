"""The accuracy tasks of this project as lm-eval tasks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flexgen_bench.accuracy.data.include import write_include
from flexgen_bench.accuracy.data.metrics import METRICS_OF
from flexgen_bench.accuracy.data.prepare import missing
from flexgen_bench.accuracy.data.readers import READERS
from flexgen_bench.accuracy.data.task_conf import OutputKind, TaskSpec, read_sets, read_tasks
from flexgen_bench.core.errors import StoreError, UserError, unknown_choice

if TYPE_CHECKING:
    from lm_eval.api.task import Task

# What lm-eval computes itself for each kind of request, as far as tasks here use it.
_LM_EVAL_METRICS: Mapping[OutputKind, tuple[str, ...]] = {
    OutputKind.MULTIPLE_CHOICE: ("acc", "acc_norm", "acc_bytes", "f1", "mcc", "brier_score"),
    OutputKind.LOGLIKELIHOOD: ("acc", "perplexity"),
    OutputKind.ROLLING: ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    OutputKind.GENERATE: ("exact_match",),
}


def list_tasks() -> list[str]:
    """Every task, variants (``mmlu_anatomy``) among them."""
    return list(read_tasks())


def list_sets() -> list[str]:
    """Every set of tasks."""
    return list(read_sets())


def task_specs(names: Iterable[str]) -> dict[str, TaskSpec]:
    """The tasks that ``names`` (of tasks and sets) mean, each once, in order, checked by ``check``. Raises UserError
    for an unknown name."""
    tasks, sets = read_tasks(), read_sets()
    chosen: dict[str, TaskSpec] = {}
    for name in names:
        if name not in tasks and name not in sets:
            raise unknown_choice("task", name, [*sets, *tasks])
        for member in sets[name].tasks if name in sets else (name,):
            if member not in tasks:
                raise unknown_choice(f"sets/{name}.yaml: tasks", member, tasks)
            chosen[member] = tasks[member]
    if not chosen:
        raise UserError("tasks", list(names), f"at least one of {', '.join([*sets, *tasks])}")
    for task in chosen.values():
        check(task)
    return chosen


def set_limit(names: Sequence[str]) -> int | None:
    """The limit that sets among ``names`` ask for themselves: the smallest."""
    sets = read_sets()
    limits = [sets[name].limit for name in names if name in sets]
    return min((n for n in limits if n is not None), default=None)


def check(task: TaskSpec) -> None:
    """UserError if the task's reader is unknown, or one of its metrics is not what lm-eval or its own function
    gives."""
    if task.source.reader not in READERS:
        raise unknown_choice(f"{task.data_name}.yaml: source.reader", task.source.reader, READERS)
    function = task.lm_eval.get("process_results")
    if function is not None and function not in METRICS_OF:
        raise unknown_choice(f"{task.data_name}.yaml: lm_eval.process_results", str(function), METRICS_OF)
    known = METRICS_OF[function] if function is not None else _LM_EVAL_METRICS[task.output]
    for metric in task.metrics:
        if metric not in known:
            raise unknown_choice(f"{task.data_name}.yaml: metric", metric, known)
    if "test" not in task.splits:
        raise UserError(f"{task.data_name}.yaml: data", dict(task.splits), "given for test")


def load_tasks(names: Sequence[str], limit: int | None, cache: Path, *, online: bool | None = None) -> dict[str, Task]:
    """lm-eval tasks by name, their data checked.

    names: tasks and sets. limit: at most so many items of each, the first of the fixed order; None: what a set asks
    for, or a task's own ``max_items``. online: True: where lm-eval has the task itself, that one, with data of the hub;
    None and False: the package's data. Raises UserError for a bad name or task, StoreError if data is missing or was
    changed, naming every such task, before anything runs.
    """
    if limit is not None and limit < 1:
        raise UserError("limit", limit, "at least 1")
    specs = task_specs(names)
    limit = limit if limit is not None else set_limit(names)
    remote = {n: s for n, s in specs.items() if online and s.lm_eval_name is not None}
    local = {n: s for n, s in specs.items() if n not in remote}
    _require_data(local, cache)
    loaded = {**_local(local, limit, cache), **_remote(remote)}
    return {name: loaded[name] for name in specs}


def _require_data(specs: Mapping[str, TaskSpec], cache: Path) -> None:
    reasons = {name: why for name, spec in specs.items() if (why := missing(spec, cache))}
    if reasons:
        raise StoreError(
            f"{len(reasons)} of {len(specs)} tasks have no usable data: "
            + "; ".join(f"{name}: {why}" for name, why in reasons.items())
        )


def _local(specs: Mapping[str, TaskSpec], limit: int | None, cache: Path) -> dict[str, Task]:
    if not specs:
        return {}
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory(prefix="flexgen-tasks-") as folder:
        write_include(Path(folder), specs.values(), cache, limit=limit)
        manager = TaskManager(include_path=folder, include_defaults=False)
        tasks: dict[str, Task] = manager.load(list(specs))["tasks"]
    return tasks


def _remote(specs: Mapping[str, TaskSpec]) -> dict[str, Task]:
    if not specs:
        return {}
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    by_name = {}
    for name, spec in specs.items():
        try:
            tasks = manager.load([spec.lm_eval_name])["tasks"]
        except Exception as error:  # lm-eval, datasets and the hub's client raise what they like
            raise StoreError(
                f"task {name}: lm-eval's {spec.lm_eval_name} cannot be loaded from the hub ({error}). "
                "Without the hub leave out online."
            ) from error
        if len(tasks) != 1:
            raise UserError(
                f"task {name} (online)", spec.lm_eval_name, "a single task of lm-eval", "Name its subjects."
            )
        by_name[name] = next(iter(tasks.values()))
    return by_name
