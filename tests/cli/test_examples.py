"""Every program in ``examples/`` runs as it stands, with a tiny model in place of the trained one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_text_models import CHAT_TEMPLATE, text_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("examples") / "ckpt", "llama", chat_template=CHAT_TEMPLATE)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs_and_says_something(example: Path, model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(example), str(model)],
        cwd=tmp_path,
        env=os.environ | {"FLEXGEN_BENCH_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 20


def test_the_list_of_examples_is_complete() -> None:
    listed = (ROOT / "examples" / "README.md").read_text()
    assert EXAMPLES
    assert all(f"`{example.name}`" in listed for example in EXAMPLES)
