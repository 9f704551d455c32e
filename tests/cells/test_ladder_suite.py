"""The ladder from a command line to its table, with a small model and real runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_bench.cli.report import main as report
from flexgen_bench.config.build import model_spec
from flexgen_bench.core.model import DType
from flexgen_bench.core.status import Status
from flexgen_bench.models.registry import weight_bytes
from flexgen_bench.store.reader import read_all
from tests.support.command import run_command


@pytest.mark.slow
def test_rungs_are_measured_and_told(tmp_path: Path) -> None:
    """A cap of four times the weights of a tiny model holds a process besides them."""
    results = tmp_path / "results"
    common = ["suite=ladder_tiny", "system=flexgen", "calibrate=false", f"results_dir={results}"]
    common += [f"cache_dir={tmp_path / 'cache'}"]
    for name in ("16bit-400", "4bit-400"):
        answer = run_command(Path(__file__).parents[2], *common, f"cell={name}")
        assert answer.returncode == 0, answer.stderr
    stored, problems = read_all(results)
    assert not problems
    assert len(stored) == 2
    for one in stored:
        record = one.record
        assert record.status is Status.OK, record.reason
        hardware = record.spec["hardware"]
        assert hardware["weight_shares"] == {"cpu": 4.0}
        assert hardware["cpu_memory_bytes"] == 4 * weight_bytes(model_spec("opt-125m").shape, DType.BFLOAT16)
        assert record.memory_cap["requested_bytes"] == hardware["cpu_memory_bytes"]
        assert 50e6 < record.environment["process"]["base_bytes"] < hardware["cpu_memory_bytes"]
        assert "cell=" in record.rerun_command, "from which the share follows"
    assert report([str(results), str(tmp_path / "reports"), "--tables", "none"]) == 0
    page = (tmp_path / "reports" / "ladder_tiny.md").read_text()
    assert "## Ladder" in page
    assert "16-bit weights, tok/s | 400 %" in page
    assert "only flexgen was tried" in page
