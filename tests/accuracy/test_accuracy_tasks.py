"""conf/accuracy: every task, set and package is complete and checked; what is wrong is named before anything runs."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flexgen_bench.accuracy.data.prepare import missing
from flexgen_bench.accuracy.data.task_conf import TaskSpec, read_packages, read_sets, read_tasks
from flexgen_bench.accuracy.data.tasks import check, list_sets, list_tasks, load_tasks, task_specs
from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.core.errors import StoreError, UserError

TASKS = read_tasks()
WHOLE = sorted({task.data_name for task in TASKS.values()})
SHA256 = re.compile(r"[0-9a-f]{64}")

GOOD: dict[str, Any] = {
    "version": 1,
    "stands_for": "nothing",
    "licence": "none",
    "source": {"reader": "copying", "options": {"items": 3, "examples": 0, "seed": 0, "longest": 5}},
    "primary_metric": "exact_match",
    "lm_eval": {
        "output_type": "generate_until",
        "doc_to_text": "{{words}}",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "process_results": "flexgen_bench.accuracy.data.metrics.text_scores",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "data": {"test": {"items": 3, "sha256": "0" * 64}},
}


def one_task(folder: Path, **changes: Any) -> TaskSpec:
    """The task ``mine`` made of GOOD; a change to None leaves the key out."""
    raw = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    (folder / "mine.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return read_tasks(folder)["mine"]


@pytest.mark.parametrize("name", WHOLE)
def test_task_is_complete(name: str) -> None:
    task, packages = TASKS[name], read_packages()
    check(task)
    assert task.licence
    assert task.stands_for
    assert task.primary_metric in task.metrics
    assert task.splits["test"].items >= (task.max_items or 1)
    assert all(SHA256.fullmatch(split.sha256) for split in task.splits.values())
    if task.source.package is None:
        assert "seed" in task.source.options
    else:
        assert packages[task.source.package].version == task.source.version
        assert task.source.files
    if task.output == "generate_until":
        wanted = task.lm_eval["generation_kwargs"]
        # Steps to an answer are long, so of such items there are few.
        assert wanted["max_gen_toks"] * min(task.max_items or 500, 500) <= 64 * 250
        assert wanted["until"]
        assert wanted["do_sample"] is False
    if task.lm_eval.get("num_fewshot"):
        # Other samplers draw other examples for each item: nothing is shared, and seeds change the numbers.
        assert task.lm_eval["fewshot_config"] == {"sampler": "first_n"}
        assert task.splits["fewshot"].items >= task.lm_eval["num_fewshot"]


@pytest.mark.parametrize("name", WHOLE)
def test_licence_allows_use(name: str) -> None:
    task = TASKS[name]
    assert not re.search(r"\bNC\b|non-?commercial", task.licence, re.I)
    assert not any("sciq" in pattern for pattern in task.source.files)
    # CoQA's passages from RACE and MCTest are for research alone.
    assert not {"race", "mctest"} & set(task.source.options.get("sources", ()))


def test_packages_are_pinned() -> None:
    for name, package in read_packages().items():
        assert SHA256.fullmatch(package.sha256), name
        assert package.form in ("wheel", "sdist")
        assert package.file.endswith(".whl" if package.form == "wheel" else ".tar.gz")


def test_sets_hold_tasks() -> None:
    sets = read_sets()
    assert {"helm", "ci", "paper", "wrangling", "table9"} <= set(sets)
    for name in sets:
        assert task_specs([name])
    # What one model has learned by heart judges that model alone.
    assert set(sets["helm"].tasks) == set(WHOLE) - {"king_james_text"}
    kinds = {TASKS[name].output for name in sets["ci"].tasks}
    assert {"multiple_choice", "loglikelihood_rolling", "generate_until"} <= kinds
    assert sets["ci"].limit is not None
    assert len(sets["table9"].tasks) == 7


def test_mmlu_has_its_subjects() -> None:
    subjects = [name for name in list_tasks() if name.startswith("mmlu_")]
    assert len(subjects) == 57
    assert TASKS["mmlu_anatomy"].where == {"subject": "anatomy"}
    assert TASKS["mmlu_anatomy"].num_fewshot == 5


def test_names_are_not_ambiguous() -> None:
    assert not set(list_tasks()) & set(list_sets())


def test_unknown_task_is_named() -> None:
    with pytest.raises(UserError, match=r"task = 'lambda'.*Did you mean 'lambada'"):
        load_tasks(["lambda"], None, Path("/nowhere"))


def test_no_task_is_refused() -> None:
    with pytest.raises(UserError, match="at least one of"):
        task_specs([])


def test_limit_is_positive() -> None:
    with pytest.raises(UserError, match="limit = 0"):
        load_tasks(["lambada"], 0, Path("/nowhere"))


def test_missing_data_is_named_for_every_task(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"2 of 2 tasks.*lambada.*fetch accuracy.*piqa"):
        load_tasks(["lambada", "piqa"], 3, tmp_path)


def test_unknown_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"key of mine\.yaml = 'license'.*Did you mean 'licence'"):
        one_task(tmp_path, license="MIT")


@pytest.mark.parametrize("key", ["version", "stands_for", "licence", "source", "lm_eval", "data"])
def test_missing_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"mine\.yaml: {key}"):
        one_task(tmp_path, **{key: None})


@pytest.mark.parametrize("metrics", [None, [], [{"aggregation": "mean"}]])
def test_task_without_metric_is_refused(tmp_path: Path, metrics: Any) -> None:
    with pytest.raises(UserError, match=r"mine\.yaml: lm_eval\.metric_list.*measures nothing"):
        one_task(tmp_path, lm_eval={**GOOD["lm_eval"], "metric_list": metrics})


def test_primary_metric_is_one_of_the_metrics(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"primary_metric = 'f1'.*exact_match"):
        one_task(tmp_path, primary_metric="f1")


def test_metric_nobody_computes_is_refused(tmp_path: Path) -> None:
    metric = {"metric": "exact_macth", "aggregation": "mean", "higher_is_better": True}
    task = one_task(tmp_path, primary_metric="exact_macth", lm_eval={**GOOD["lm_eval"], "metric_list": [metric]})
    with pytest.raises(UserError, match="Did you mean 'exact_match'"):
        check(task)


def test_unknown_reader_and_function_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source\.reader = 'coping'.*Did you mean 'copying'"):
        check(one_task(tmp_path, source={**GOOD["source"], "reader": "coping"}))
    wrong = {**GOOD["lm_eval"], "process_results": "os.system"}
    with pytest.raises(UserError, match=r"process_results = 'os\.system'"):
        check(one_task(tmp_path, lm_eval=wrong))


def test_what_the_project_fills_in_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lm_eval\.dataset_path = 'json'"):
        one_task(tmp_path, lm_eval={**GOOD["lm_eval"], "dataset_path": "json"})


def test_examples_need_a_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="test and fewshot"):
        one_task(tmp_path, lm_eval={**GOOD["lm_eval"], "num_fewshot": 2})


def test_broken_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("a: b: c")
    with pytest.raises(UserError, match=r"mine\.yaml"):
        read_tasks(tmp_path)


def test_aggregations_are_known_to_lm_eval_or_exist() -> None:
    registry = pytest.importorskip("lm_eval.api.registry")
    pytest.importorskip("lm_eval.api.metrics")
    for name in WHOLE:
        for metric in TASKS[name].lm_eval["metric_list"]:
            module, _, function = metric["aggregation"].rpartition(".")
            if module:
                assert callable(getattr(importlib.import_module(module), function))
            else:
                assert metric["aggregation"] in registry.AGGREGATION_REGISTRY


def _real(name: str) -> TaskSpec:
    pytest.importorskip("lm_eval")
    why = missing(TASKS[name], default_cache_dir())
    if why is not None:
        pytest.skip(f"no data: {why}")
    return TASKS[name]


@pytest.mark.parametrize("name", WHOLE)
def test_real_items_are_askable(name: str) -> None:
    """With the real data: prompts render, the right answer is among the choices, and is not told in the examples."""
    task = _real(name)
    loaded = load_tasks([name], 12, default_cache_dir())[name]
    assert len(loaded.eval_docs) == min(12, task.splits["test"].items)
    shown = [] if not task.lm_eval.get("num_fewshot") else list(loaded.fewshot_docs())
    for doc in loaded.eval_docs:
        assert doc not in shown
        target = loaded.doc_to_target(doc)
        prompt = loaded.fewshot_context(doc, num_fewshot=task.lm_eval.get("num_fewshot", 0))
        assert target not in ("", None)
        for text in [prompt] if isinstance(prompt, str) else prompt:
            assert "{{" not in text
            assert "Undefined" not in text
        if task.output == "multiple_choice":
            choices = loaded.doc_to_choice(doc)
            assert len(choices) >= 2
            assert isinstance(prompt, list) or target in range(len(choices))
        assert all(str(value) != "" for key, value in doc.items() if key != "before")
