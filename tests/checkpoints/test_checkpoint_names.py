"""What names a model: words that are none are told apart before anything is looked up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.cells.compose import command_cells
from flexgen_bench.core.errors import UserError
from flexgen_bench.llm.model_source import checkpoint_of
from tests.support.gguf_writing import tiny_llama
from tests.support.shapes import no_progress


@pytest.mark.parametrize("model", [None, 5, b"/tmp", "", ["/tmp"]], ids=repr)
def test_what_is_no_name_is_refused(model: Any, tmp_path: Path) -> None:
    """None, numbers and bytes ended in a bare TypeError of pathlib."""
    with pytest.raises(UserError, match=r"model = .*a checkpoint folder"):
        checkpoint_of(model, None, tmp_path, no_progress)


@pytest.mark.parametrize("name", ["/no/such/folder", "no/such/folder", "./nothing", "~/nothing", "a b/c"])
def test_a_path_that_is_not_there_is_no_hub_id(name: str, tmp_path: Path) -> None:
    """The hub was asked for it, and had "no repository '/no/such/folder'"."""
    with pytest.raises(UserError, match="a folder or file that exists"):
        checkpoint_of(name, None, tmp_path, no_progress)


def test_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``LLM("~/model")`` asked the hub, though ``location=~/model`` was read."""
    tiny_llama(50).save_pretrained(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    found, _ = checkpoint_of("~/model", None, tmp_path / "cache", no_progress)
    assert Path(found) == tmp_path / "model"


def test_an_empty_name_is_not_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``location=$UNSET`` in a shell took the checkpoint of the current folder without a word."""
    tiny_llama(50).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="model"):
        checkpoint_of("", None, tmp_path / "cache", no_progress)
    with pytest.raises(UserError) as refused:
        command_cells(["weights=path", "location=", "system=flexgen"])
    assert refused.value.field == "location"
