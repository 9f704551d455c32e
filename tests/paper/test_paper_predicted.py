"""What systems are asked beside printed values, and how answers are kept until something that decides them changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.config.table import ConfiguredSystem
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import EXACT, Lossy
from flexgen_bench.core.policy import Policy, Schedule
from flexgen_bench.core.record import SystemReport
from flexgen_bench.store import kept_predictions
from tests.support.paper_fakes import FakePredictor
from tests.support.paper_report import FOUR, only, paper_cell, put, rows_of, run, system


def test_simulations_stand_beside_printed_values(tmp_path: Path, fake_systems: list[ConfiguredSystem]) -> None:
    folder = run(tmp_path, "--tables", "t2,t3")
    rows = rows_of(folder, "t2")
    printed = {"table": "T2", "prompt_len": "512"}
    row = only(rows, system="FlexGen", model="OPT-30B", **printed)
    # 144 prompts of 32 tokens in 2 x 144 s; this engine's block is 2: 64 tokens in 0.4 s.
    assert (row["simulated"], row["simulated_evidence"], row["simulated_source"]) == ("16", "SIMULATED", "two")
    assert row["simulated_ratio"] == f"{16 / 7.32:.2f}"
    assert (row["ours"], row["ours_ratio"], row["ours_lossy"]) == ("160", f"{160 / 7.32:.1f}", "exact")
    row = only(rows, system="FlexGen(c)", model="OPT-175B", **printed)
    assert (row["simulated"], row["ours"]) == ("16", "160")
    assert row["ours_lossy"] == "4-bit weights, 4-bit KV"
    row = only(rows, system="FlexGen", model="OPT-175B", **printed)
    assert (row["simulated"], row["ours"], row["simulated_ratio"]) == ("OOM", "OOM", "")
    assert row["simulated_evidence"] == "SIMULATED"
    row = only(rows, system="Accelerate", model="OPT-30B", **printed)
    assert (row["simulated"], row["ours"]) == ("16", "-")
    assert only(rows, system="DeepSpeed ZeRO-Inference", model="OPT-30B", **printed)["simulated"] == "no model"
    assert only(rows, system="Petals", model="OPT-30B", **printed)["simulated"] == "-"
    row = only(rows, system="FlexGen", model="OPT-30B", table="T2", prompt_len="1024")
    assert row["simulated"] == "cannot run"
    page = (folder / "t2.md").read_text()
    assert "| simulated | SIMULATED | 16.0 (0.63x) | 16.0 (2.19x) | OOM |" in page
    assert "| this engine, 4-bit weights, 4-bit KV | SIMULATED |" in page
    for reason in ("Take a smaller model", "something else", "three: no predictor"):
        assert reason in page
    four = [r for r in rows_of(folder, "t3") if r["gpus"] == "4" and r["system"] == "FlexGen"]
    assert {r["simulated"] for r in four} == {"cannot run"}


def test_systems_are_asked_in_their_own_words(tmp_path: Path, fake_systems: list[ConfiguredSystem]) -> None:
    run(tmp_path, "--tables", "t2")
    asked = [(options, q) for options, q in FakePredictor.asked if q.shape.name == "opt-30b" and q.prompt_len == 512]
    (options, job), *others = [a for a in asked if a[0].get("num_gpu_batches") == 3]
    assert not others
    assert options == {
        "percent": [20, 80, 0, 100, 0, 100],
        "gpu_batch_size": 48,
        "num_gpu_batches": 3,
        "cpu_cache_compute": True,
        "pin_weight": True,
        "overlap": True,
        "sep_layer": None,
    }
    assert (job.num_prompts, job.lossy, job.dtype.value) == (None, EXACT, "float16")
    assert job.hardware.name == "t4"
    (_, job), *_ = [a for a in asked if a[0].get("num_gpu_batches") == 20]
    assert job.lossy == Lossy(kv_cache=FOUR), "OPT-30B compresses its KV cache alone"
    assert [o for o, _ in asked if "offload" in o] == [{"offload": "cpu", "batch_size": 8}]
    ours = [q.lossy for o, q in asked if "policy" in o]
    assert ours == [EXACT, Lossy(weights=FOUR, kv_cache=FOUR)]


def test_no_question_is_asked_twice(tmp_path: Path, fake_systems: list[ConfiguredSystem]) -> None:
    run(tmp_path)
    asked = [repr((sorted(o.items()), q)) for o, q in FakePredictor.asked]
    assert len(asked) > 100
    assert len(set(asked)) == len(asked)


def test_answers_are_kept_until_something_that_decides_them_changes(
    tmp_path: Path, fake_systems: list[ConfiguredSystem], capsys: pytest.CaptureFixture[str]
) -> None:
    first = rows_of(run(tmp_path, "--tables", "t2"), "t2")
    kept = tmp_path / "results" / "predictions.json"
    text = kept.read_text()
    asked = len(FakePredictor.asked)
    assert f"{asked} predictions to make" in capsys.readouterr().err
    assert asked == len(json.loads(text)["answers"])
    assert "opt-30b on t4, a block of 512, 32 generated, exact" in text
    assert rows_of(run(tmp_path, "--tables", "t2"), "t2") == first
    assert len(FakePredictor.asked) == asked
    assert "predictions" not in capsys.readouterr().err
    assert kept.read_text() == text
    # A constant of one system: that one is asked anew, and what it said before is dropped with the next whole build.
    fake_systems[0] = system(
        "one", "Accelerate", fake_systems[0].options, choices=fake_systems[0].choices, constants={"slow": 2.0}
    )
    row = only(rows_of(run(tmp_path, "--tables", "t2"), "t2"), system="Accelerate", model="OPT-30B", prompt_len="512")
    assert row["simulated"] == "8"
    assert len(FakePredictor.asked) == asked + 6
    assert len(json.loads(kept.read_text())["answers"]) == asked + 6
    run(tmp_path)
    every = len({repr((sorted(o.items()), q)) for o, q in FakePredictor.asked})
    assert len(json.loads(kept.read_text())["answers"]) == every


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:200],
        lambda text: text.replace('"schema_version": ', '"schema_version": 9'),
        lambda text: text.replace('"prefill_s": ', '"prefill_s": -'),
        lambda text: text.replace('"batch_size": ', '"batch_size": "x", "y": '),
        lambda text: text.replace('"overlapped"', '"lapped"'),
        lambda text: "[]",
        lambda text: "[" * 100_000,
        lambda text: "\udcff",
    ],
)
def test_a_damaged_file_of_answers_is_made_anew(
    tmp_path: Path, fake_systems: list[ConfiguredSystem], capsys: pytest.CaptureFixture[str], damage: Any
) -> None:
    """It is only a cache, and ended all tables."""
    first = rows_of(run(tmp_path, "--tables", "t2"), "t2")
    kept = tmp_path / "results" / "predictions.json"
    text = kept.read_text()
    kept.write_bytes(damage(text).encode(errors="surrogateescape"))
    capsys.readouterr()
    assert rows_of(run(tmp_path, "--tables", "t2"), "t2") == first
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("warning:") and str(kept) in line]
    assert kept.read_text() == text


def test_an_answer_that_is_kept_says_all_that_a_new_one_says(
    tmp_path: Path, fake_systems: list[ConfiguredSystem]
) -> None:
    fake_systems[1] = engine_that("overlaps", "kv_alone")
    first = rows_of(run(tmp_path, "--tables", "t2,t3"), "t3")
    asked = len(FakePredictor.asked)
    assert rows_of(run(tmp_path, "--tables", "t2,t3"), "t3") == first
    assert len(FakePredictor.asked) == asked


def engine_that(*does: str) -> ConfiguredSystem:
    constants = {"slow": 0.1, **dict.fromkeys(does, 1.0)}
    return system("flexgen", "FlexGen", {"policy": None}, constants=constants)


def test_phases_that_overlap_have_no_throughput_of_their_own(
    tmp_path: Path, fake_systems: list[ConfiguredSystem]
) -> None:
    """The decoding of this engine's continuous jobs, prefill included, was divided by the paper's decoding alone."""
    fake_systems[1] = engine_that("overlaps")
    folder = run(tmp_path, "--tables", "t3")
    where = {"system": "FlexGen", "model": "OPT-30B", "gpus": "1"}
    decoding = only(rows_of(folder, "t3"), metric="decoding throughput", **where)
    assert (decoding["ours"], decoding["ours_ratio"], decoding["ours_evidence"]) == ("-", "", "-")
    assert float(decoding["simulated"]) > 0
    whole = only(rows_of(folder, "t3"), metric="generation throughput", **where)
    assert whole["ours"] == "160"
    page = (folder / "t3.md").read_text()
    assert "flexgen: its blocks overlap" in page[page.index("## Why there is no number") :]


def test_what_is_compressed_is_named_and_not_what_might_be(
    tmp_path: Path, fake_systems: list[ConfiguredSystem]
) -> None:
    """Where the search chose to compress the KV cache alone, the row said weights, too: they were permitted."""
    fake_systems[1] = engine_that("kv_alone")
    folder = run(tmp_path, "--tables", "t2,t15,t16,fig1")
    row = only(rows_of(folder, "t2"), system="FlexGen(c)", model="OPT-30B", table="T2", prompt_len="512")
    assert row["ours_lossy"] == "4-bit KV"
    for name in ("t2", "t15", "t16", "fig1"):
        page = (folder / f"{name}.md").read_text()
        assert "this engine, 4-bit KV" in page, name
        assert "4-bit weights, 4-bit KV" not in page, name


def test_a_record_of_blocks_that_overlap_tells_no_phases(tmp_path: Path, fake_systems: list[ConfiguredSystem]) -> None:
    policy = Policy(8, 4, schedule=Schedule.CONTINUOUS)
    put(tmp_path, paper_cell("flexgen"), report=SystemReport(requested=to_json(policy)))
    rows = rows_of(run(tmp_path, "--tables", "t3"), "t3")
    where = {"system": "FlexGen", "model": "OPT-30B", "gpus": "1"}
    whole = only(rows, metric="generation throughput", **where)
    assert (whole["ours"], whole["ours_evidence"]) == ("16", "MEASURED")
    assert only(rows, metric="decoding throughput", **where)["ours"] == "-"


def test_an_answer_depends_on_the_code_that_gave_it(
    tmp_path: Path, fake_systems: list[ConfiguredSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, "--tables", "t2")
    asked = len(FakePredictor.asked)
    monkeypatch.setattr(kept_predictions, "code_of", lambda predictor: "another")
    run(tmp_path, "--tables", "t2")
    assert len(FakePredictor.asked) == 2 * asked
    monkeypatch.undo()
    digests = {
        kept_predictions.code_of(p)
        for p in ("tests.support.paper_fakes:FakePredictor", "flexgen_bench.planner.x:X", "baselines.x:X")
    }
    assert len(digests) == 3
    assert kept_predictions.code_of("flexgen_bench.planner.y:Y") in digests


def test_several_processes_say_what_one_says(tmp_path: Path, fake_systems: list[ConfiguredSystem]) -> None:
    one = run(tmp_path / "one", "--tables", "t2")
    two = run(tmp_path / "two", "--tables", "t2", "--workers", "2")
    assert (one / "t2.csv").read_bytes() == (two / "t2.csv").read_bytes()
    kept = [(tmp_path / n / "results" / "predictions.json").read_bytes() for n in ("one", "two")]
    assert kept[0] == kept[1]


def test_jobs_have_the_prompts_that_were_run(tmp_path: Path, fake_systems: list[ConfiguredSystem]) -> None:
    folder = run(tmp_path, "--tables", "t10,t9,t3")
    row = only(rows_of(folder, "t10"), model="OPT-30B", metric="data wrangling total time: EM Fodors-Zagats")
    assert row["simulated"] == f"{2 * 60}", "a block is 60; the prompts are 180"
    lens = {(q.prompt_len, q.num_prompts) for o, q in FakePredictor.asked if "policy" in o}
    assert (744, 180) in lens
    assert (1984, 1568) in lens
    assert (512, 864) in lens
    of_four = {q.num_prompts for o, q in FakePredictor.asked if q.num_gpus == 4 and "percent" in o}
    assert of_four == {96, 768, 160}
