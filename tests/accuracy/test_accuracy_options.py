"""What is wrong with a command is named before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.accuracy.run.options import Request, to_request
from flexgen_bench.cli.accuracy import _composed, main
from flexgen_bench.core.errors import StoreError
from tests.support.tiny_models import random_model, save

pytest.importorskip("lm_eval")


def request_of(*words: str) -> Request:
    return to_request(*_composed(words))


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be loaded, and no folder made."""

    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was opened")

    monkeypatch.setattr("flexgen_bench.accuracy.run.run.opened", loaded)


@pytest.mark.usefixtures("never")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["mode=w5"], "mode = 'w5': must be one of"),
        (["mode=[w4,w44]"], "Did you mean 'w4'?"),
        (["mode=[]"], "mode = []"),
        (["tasks=lambda"], "Did you mean 'lambada'?"),
        (["tasks=[lambada,nothing]"], "task = 'nothing'"),
        (["reference=nobody"], "reference = 'nobody'"),
        (["limit=0"], "limit = 0"),
        (["limit=many"], "limit = 'many'"),
        (["margin.score=2"], "margin.score = 2.0"),
        (["margin.bits=0"], "margin.bits = 0.0"),
        (["margin.scores=0.1"], "margin.scores"),
        (["dtype=float12"], "dtype = 'float12'"),
        (["text_tokens=-1"], "text_tokens = -1"),
        (["batch_size=0"], "batch_size = 0"),
        (["max_length=1"], "max_length = 1"),
        (["modes=w4"], "Did you mean 'mode'?"),
        (["model=opt-125"], "Did you mean 'opt-125m'?"),
        (["model=opt-125m"], "random numbers have no accuracy"),
        (["model=/no/such/folder"], "an existing folder or .gguf file"),
        (["checkpoint=/tmp", "weights=hub"], "given alone"),
        (["system=zero_inference_2023"], "system = 'zero_inference_2023'"),
        (["system=transformers", "mode=w4"], "It cannot change weights"),
        (["system=flexgen_original"], "gives log-likelihoods"),
        (["policy=all-cpu", "+policy.lossy.weights=4"], "mode= says what may change"),
        (["--modes"], "must be key=value"),
        (["w4"], "must be key=value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input(words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"results_dir={tmp_path / 'results'}", f"cache_dir={tmp_path / 'cache'}", *words]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.usefixtures("never")
def test_missing_data_is_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise StoreError("1 of 2 tasks have no usable data: lambada: no such file")

    monkeypatch.setattr("flexgen_bench.accuracy.data.tasks.load_tasks", missing)
    assert main([f"results_dir={tmp_path}", "tasks=[lambada,piqa]"]) == 1
    assert "lambada: no such file" in capsys.readouterr().err


def test_a_model_without_tokenizer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.accuracy.test_accuracy_run import tiny_tasks

    monkeypatch.setattr("flexgen_bench.accuracy.run.run.requested_tasks", lambda request, limit: tiny_tasks())
    folder = save(random_model("opt"), tmp_path / "plain")
    assert main([f"model={folder}", f"results_dir={tmp_path}", f"cache_dir={tmp_path / 'cache'}"]) == 2
    assert "tokenizer" in capsys.readouterr().err


def test_models_by_name_by_path_and_by_hub_id(tmp_path: Path) -> None:
    folder = save(random_model("opt"), tmp_path / "my-model")
    assert request_of("model=smollm2-135m").source == "smollm2-135m"
    by_path = request_of(f"model={folder}")
    assert (by_path.source, by_path.model) == (str(folder), "my-model")
    by_hub = request_of("model=opt-30b", "weights=hub")
    assert (by_hub.source, by_hub.model) == ("facebook/opt-30b", "opt-30b")
    by_id = request_of("model=somebody/some-model")
    assert (by_id.source, by_id.model) == ("somebody/some-model", "somebody_some-model")


def test_lists_limits_and_the_uncompressed_mode() -> None:
    found = request_of("mode=[w4,exact,w3,w4]", "tasks=[piqa,lambada]", "limit=null")
    assert [mode.name for mode in found.modes] == ["w4", "w3"]
    assert found.exact.lossy.is_exact
    assert found.tasks == ("piqa", "lambada")
    assert found.limit is None
    assert request_of("mode=w4").limit == "auto"


def test_help_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for word in ("w4kv4-sparse", "helm", "lambada", "reference=exact", "smollm2-135m"):
        assert word in text
