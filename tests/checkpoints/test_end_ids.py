"""Which tokens end a generation: what the files of a checkpoint say, or nothing that is a guess."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.core.errors import StoreError
from flexgen_bench.engine.tokenization import TextTokenizer


def end_ids(folder: Path, **files: Any) -> frozenset[int]:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps({"eos_token_id": value}))
    return TextTokenizer(folder).end_ids


def test_generation_counts_before_the_model(tmp_path: Path) -> None:
    assert end_ids(tmp_path) == frozenset()
    assert end_ids(tmp_path, config=2) == {2}
    assert end_ids(tmp_path, generation_config=None) == {2}
    assert end_ids(tmp_path, generation_config=[3, 0]) == {3, 0}


@pytest.mark.parametrize("value", ["2", True, 2.0, [2, None], [[2]], {"id": 2}], ids=repr)
@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_what_is_no_id_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    """``"2"`` and ``[2, null]`` were compared with ids: nothing was equal, and answers went on to
    their full length. ``[[2]]`` ended in a bare TypeError."""
    with pytest.raises(StoreError, match=rf"{name}\.json: eos_token_id is .* an integer"):
        end_ids(tmp_path, **{name: value})
