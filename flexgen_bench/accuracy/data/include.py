"""Our tasks as a folder for lm-eval's ``--include_path``. This project loads its tasks from such a folder too, so both
run the same thing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from flexgen_bench.accuracy.data.prepare import rows_path
from flexgen_bench.accuracy.data.task_conf import SetSpec, TaskSpec

_LOAD = "flexgen_bench.accuracy.data.dataset.load"
# A text that starts with this is the name of a function.
_OURS = "flexgen_bench."


class _Function(str):
    """A name that lm-eval imports: ``!function module.name``."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def include_dir(cache: Path) -> Path:
    """The folder that ``python -m flexgen_bench fetch accuracy`` writes."""
    return cache / "accuracy" / "lm_eval"


def lm_eval_task(task: TaskSpec, cache: Path, limit: int | None = None) -> dict[str, Any]:
    """lm-eval's configuration of the task. limit: at most so many items, beside the task's own ``max_items``."""
    bounds = [n for n in (limit, task.max_items) if n is not None]
    data: dict[str, Any] = {
        "rows_of": {
            name: {"path": str(rows_path(cache, task, name)), "sha256": split.sha256}
            for name, split in task.splits.items()
        }
    }
    if task.where:
        data["where"] = dict(task.where)
    if bounds:
        data["first"] = min(bounds)
    return {
        "task": task.name,
        "custom_dataset": _Function(_LOAD),
        "dataset_kwargs": data,
        "test_split": "test",
        **({"fewshot_split": "fewshot"} if "fewshot" in task.splits else {}),
        **{key: _marked(value) for key, value in task.lm_eval.items()},
        "metadata": {"version": task.version},
    }


def write_include(
    folder: Path,
    tasks: Iterable[TaskSpec],
    cache: Path,
    *,
    sets: Mapping[str, SetSpec] | None = None,
    limit: int | None = None,
) -> None:
    """One YAML per task, and one group ``flexgen_<set>`` per set. What was in the folder and is no task any more is
    removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.yaml"):
        old.unlink()
    for task in tasks:
        _write(folder / f"{task.name}.yaml", lm_eval_task(task, cache, limit))
    for name, chosen in (sets or {}).items():
        _write(
            folder / f"flexgen_{name}.yaml",
            {"group": f"flexgen_{name}", "task": list(chosen.tasks), "metadata": {"version": 1}},
        )


def _marked(value: Any) -> Any:
    # Functions of this project, wherever they stand: process_results, or the aggregation of a metric.
    if isinstance(value, Mapping):
        return {key: _marked(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_marked(one) for one in value]
    return _Function(value) if isinstance(value, str) and value.startswith(_OURS) else value


def _write(path: Path, content: Mapping[str, Any]) -> None:
    text = yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=120)
    path.write_text(text, encoding="utf-8")
