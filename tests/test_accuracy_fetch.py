"""``python -m flexgen_bench.fetch accuracy``, on tasks that need no package, and lm-eval run on what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.accuracy.include import include_dir
from flexgen_bench.accuracy.tasks import load_tasks
from flexgen_bench.fetch import main


def fetched(cache: Path) -> Path:
    names = ["copying_words", "synthetic_reasoning_natural_easy"]
    assert main(["accuracy", "--cache-dir", str(cache), "--tasks", *names]) == 0
    return include_dir(cache)


def test_fetch_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fetched(tmp_path)
    assert f"--include_path {folder}" in capsys.readouterr().out
    assert len(list(folder.glob("*.yaml"))) == 2, "only what has data can be asked for"
    fetched(tmp_path)
    assert "copying_words: 503 rows are there" in capsys.readouterr().out


def test_unknown_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accuracy", "--cache-dir", str(tmp_path), "--tasks", "copying_word"]) == 2
    assert "Did you mean 'copying_words'" in capsys.readouterr().err
    assert main(["acuracy", "--cache-dir", str(tmp_path)]) == 2
    assert "Did you mean 'accuracy'" in capsys.readouterr().err


def test_both_ways_in_ask_the_same(tmp_path: Path) -> None:
    """lm-eval with --include_path and --limit, and this project's load_tasks: same requests, same documents, same order."""
    pytest.importorskip("lm_eval")
    import lm_eval
    from lm_eval.tasks import TaskManager

    names = ["copying_words", "synthetic_reasoning_natural_easy"]
    manager = TaskManager(include_path=str(fetched(tmp_path)), include_defaults=False)
    common: dict[str, Any] = {"model": "dummy", "log_samples": True, "bootstrap_iters": 0}
    theirs = lm_eval.simple_evaluate(tasks=names, task_manager=manager, limit=3, **common)
    loaded = list(load_tasks(names, 3, tmp_path).values())
    ours = lm_eval.simple_evaluate(tasks=loaded, task_manager=manager, **common)
    assert theirs is not None
    assert ours is not None
    for name in names:
        asked = [[s["doc"], s["arguments"]] for s in theirs["samples"][name]]
        assert asked == [[s["doc"], s["arguments"]] for s in ours["samples"][name]]
        assert len(asked) == 3
    assert theirs["versions"] == ours["versions"]
