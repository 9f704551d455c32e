"""The benchmark of ``batch`` beside other ways to run the same requests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import batch_throughput


def test_its_cache_is_the_one_that_a_library_user_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With transformers among the systems and no --cache-dir it ended in a TypeError of Path(None)."""
    monkeypatch.setenv("FLEXGEN_BENCH_CACHE", str(tmp_path))
    assert batch_throughput.parsed([]).cache_dir == tmp_path
    assert batch_throughput.parsed(["--cache-dir", "~/elsewhere"]).cache_dir == Path.home() / "elsewhere"
