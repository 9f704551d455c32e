"""Records of the same job take the place of simulations in the paper's tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_bench.config.table import ConfiguredSystem
from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.record import SystemReport
from flexgen_bench.core.status import Evidence, Status
from tests.support.paper_report import FOUR, only, paper_cell, put, rows_of, run


def test_a_record_of_the_same_job_takes_the_place_of_a_simulation(
    tmp_path: Path, fake_systems: list[ConfiguredSystem]
) -> None:
    path = put(tmp_path, paper_cell("flexgen"))
    put(tmp_path, paper_cell("flexgen", machine="a100"))
    put(tmp_path, paper_cell("flexgen", lossy=Lossy(weights=FOUR)))
    folder = run(tmp_path, "--tables", "t2")
    row = only(rows_of(folder, "t2"), system="FlexGen", model="OPT-30B", prompt_len="512")
    assert (row["ours"], row["ours_evidence"], row["ours_ratio"]) == ("16", "MEASURED", f"{16 / 7.32:.2f}")
    assert row["ours_source"] == path.relative_to(tmp_path / "results").as_posix()
    others = [r for r in rows_of(folder, "t2") if r["ours_evidence"] == "MEASURED"]
    assert others == [row], "another machine and another compression are other jobs"
    page = (folder / "t2.md").read_text()
    assert "| this engine | SIMULATED and MEASURED |" in page
    assert "160 (S) (6.33x)" in page, "two kinds in a line are marked"


@pytest.mark.parametrize("evidence", [Evidence.EMULATED, Evidence.PROJECTED])
def test_the_evidence_of_a_record_is_its_own(
    tmp_path: Path, fake_systems: list[ConfiguredSystem], evidence: Evidence
) -> None:
    put(tmp_path, paper_cell("flexgen"), evidence=evidence)
    folder = run(tmp_path, "--tables", "t2")
    row = only(rows_of(folder, "t2"), system="FlexGen", model="OPT-30B", prompt_len="512")
    assert row["ours_evidence"] == evidence.value
    assert f"16.0 ({evidence.value[0]}) (2.19x)" in (folder / "t2.md").read_text()


def test_a_record_counts_for_the_policy_it_ran_with(tmp_path: Path, fake_systems: list[ConfiguredSystem]) -> None:
    ran = {
        "percent": [20, 80, 0, 100, 0, 100],
        "gpu_batch_size": 48,
        "num_gpu_batches": 3,
        "cpu_cache_compute": True,
        "pin_weight": True,
        "overlap": False,
    }
    put(tmp_path, paper_cell("two"), report=SystemReport(requested=ran))
    rows = rows_of(run(tmp_path, "--tables", "t4"), "t4")
    measured = [r["system"] for r in rows if r["simulated_evidence"] == "MEASURED"]
    assert measured == ["FlexGen: no overlapping"]


def test_a_run_out_of_memory_is_a_result_and_a_failed_one_is_none(
    tmp_path: Path, fake_systems: list[ConfiguredSystem]
) -> None:
    put(tmp_path, paper_cell("flexgen"), status=Status.OOM, reason="killed by the cap", samples=())
    failed = paper_cell("flexgen", lossy=Lossy(weights=FOUR, kv_cache=FOUR))
    put(tmp_path, failed, status=Status.FAILED, reason="a bug")
    rows = rows_of(run(tmp_path, "--tables", "t2"), "t2")
    where = {"model": "OPT-30B", "prompt_len": "512"}
    row = only(rows, system="FlexGen", **where)
    assert (row["ours"], row["ours_evidence"]) == ("OOM", "MEASURED")
    row = only(rows, system="FlexGen(c)", table="T2", **where)
    assert (row["ours"], row["ours_evidence"]) == ("160", "SIMULATED")
