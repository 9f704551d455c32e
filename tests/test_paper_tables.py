"""The paper's tables: every printed value with its trust, what stands beside it, and what is wrong told by name."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paper_fakes import FakePredictor
from record_factory import SHAPE, make_record, make_spec

from flexgen_bench.config import conf_dir, hardware_profile, model_spec
from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.compression import EXACT, Compression, Lossy
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.policy import Policy, Schedule
from flexgen_bench.core.record import Sample, SystemReport
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.report.__main__ import main
from flexgen_bench.report.paper import answers, build
from flexgen_bench.report.paper.latex import escape as latex_escape
from flexgen_bench.report.paper.policy_text import parse_policy
from flexgen_bench.report.paper.quoted import COLUMNS, Quoted, read_quoted
from flexgen_bench.report.table import escape as markdown_escape
from flexgen_bench.store.writer import write_record
from flexgen_bench.table_conf import ConfiguredSystem, list_tables, paper_dir, table_conf

FOUR = Compression(4, 64)
PRINTED = read_quoted(paper_dir() / "tables.csv")
ORIGINAL_OPTIONS = (
    "percent", "gpu_batch_size", "num_gpu_batches", "cpu_cache_compute", "pin_weight", "overlap", "sep_layer",
)  # fmt: skip


def system(
    name: str, printed_as: str | None, options: dict[str, Any], **more: Any
) -> ConfiguredSystem:
    target = "paper_fakes:FakePredictor"
    values = {
        "name": name,
        "predictor": target,
        "constants": {"slow": 1.0},
        "printed_as": printed_as,
    }
    return ConfiguredSystem(**(values | {"options": options} | more))


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ConfiguredSystem]]:
    """Systems under the paper's names whose predictions are known; ``flexgen`` is this engine, and ten times as fast."""
    systems = [
        system(
            "one", "Accelerate", {"offload": "auto"}, choices={"offload": ["auto", "cpu", "disk"]}
        ),
        system("flexgen", "FlexGen", {"policy": None}, constants={"slow": 0.1}),
        system("two", "FlexGen", dict.fromkeys(ORIGINAL_OPTIONS)),
        system("three", "DeepSpeed ZeRO-Inference", {"offload": "cpu"}, predictor=None),
    ]
    monkeypatch.setattr(build, "configured_systems", lambda: systems)
    FakePredictor.asked.clear()
    yield systems
    FakePredictor.asked.clear()


def run(tmp_path: Path, *arguments: str, status: int = 0) -> Path:
    """The folder of the paper's tables, built from the records in ``tmp_path/results``."""
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir(exist_ok=True, parents=True)
    assert main([str(results), str(out), "--workers", "1", *arguments]) == status
    return out / "paper"


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def only(rows: list[dict[str, str]], **where: str) -> dict[str, str]:
    found = [r for r in rows if all(r[k] == v for k, v in where.items())]
    assert len(found) == 1, found
    return found[0]


# --- what is printed


def test_the_printed_values_are_read_with_their_trust() -> None:
    assert len(PRINTED) > 400
    assert {r.trust.replace(",", " ").split()[0] for r in PRINTED if r.value != "NOT FOUND"} == {
        "exact", "copy", "digitised", "derived", "reconstructed",
    }  # fmt: skip
    helm = next(r for r in PRINTED if r.table == "T9")
    assert helm.trust == "copy", "the first bracket is the value's, the second the policy's"
    assert (helm.quantity, helm.item) == ("HELM running time", "wikifact plaintiff")


@pytest.mark.parametrize("name", ["T2", "T3", "T4", "T16"])
def test_every_printed_value_is_in_the_output_with_its_trust(tmp_path: Path, name: str) -> None:
    folder = run(tmp_path, "--no-simulation", "--tables", name.lower())
    wanted = [r for r in PRINTED if r.table == name]
    assert wanted
    rows = rows_of(folder, name.lower())
    page = (folder / f"{name.lower()}.md").read_text()
    grid = page[: page.index("## Every value")]
    for row in wanted:
        keys = ("table", "system", "model", "prompt_len", "gen_len", "gpus", "metric")
        found = only(rows, **{k: getattr(row, k) for k in keys})
        assert (found["printed"], found["trust"]) == (row.value, row.trust)
        assert found["printed_evidence"] == "QUOTED"
        assert found["printed_source"] == row.source
        assert re.search(rf"[| ]{re.escape(row.value)}0*[| ]", grid), row
        details = f"| {row.value} | QUOTED | {row.trust} | {markdown_escape(row.source)} |"
        assert details in page
        assert re.search(rf"QUOTED \([^)]*\b{row.trust}\b", grid)


@pytest.mark.parametrize(("table", "shown"), [("t16", "| 3.50 \\["), ("t5", "| 12.90 |")])
def test_zeros_at_the_end_are_as_in_the_paper(tmp_path: Path, table: str, shown: str) -> None:
    """3.5 and 12.9 stood in tables that have no number of decimals."""
    folder = run(tmp_path, "--no-simulation", "--tables", table)
    assert shown in (folder / f"{table}.md").read_text()


def test_the_order_is_the_papers(tmp_path: Path) -> None:
    folder = run(tmp_path, "--no-simulation", "--tables", "t2")
    lines = (folder / "t2.md").read_text().splitlines()
    grid = [
        [c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")
    ]
    assert grid[0][3:] == [
        f"prompt {p}, {m}" for p in ("512", "1024") for m in ("6.7B", "30B", "175B")
    ]
    assert [line[0] for line in grid[2:7]] == [
        "**Accelerate**", "**DeepSpeed**", "**Petals**", "**FlexGen**", "**FlexGen (c)**",
    ]  # fmt: skip
    assert [cell.split()[0] for cell in grid[5][3:]] == [
        "25.26",
        "7.32",
        "0.69",
        "13.72",
        "3.50",
        "0.35",
    ]
    assert "8.70 \\[" in grid[6][4]
    assert "8.38 \\[" in grid[6][4]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("t2", ["two policies: 8.70", "total throughput divided by the number of GPUs", "KV cache alone", "GB are GiB", "is a rounding", "8.2 %"]),
        ("t3", ["nothing confirms", "page cache"]),
        ("t4", ["6.93 with"]),
        ("t8", ["3249 s against 2711", "page cache helps"]),
        ("t10", ["imply 210.7 samples"]),
        ("t13", ["not found"]),
        ("t21", ["not found"]),
        ("cost", [re.escape("4.2 times"), "4.09"]),
        ("fig4", ["different runs", "too high by about 0.05"]),
        ("t5", ["not measured yet"]),
    ],
)  # fmt: skip
def test_what_the_paper_contradicts_is_said(tmp_path: Path, table: str, words: list[str]) -> None:
    folder = run(tmp_path, "--no-simulation", "--tables", table)
    for suffix in ("md", "tex") if table != "t5" else ("md",):
        text = (folder / f"{table}.{suffix}").read_text().replace("\\%", "%")
        for word in words:
            assert re.search(word, text), (suffix, word)


def test_a_value_that_nobody_found_is_no_quotation(tmp_path: Path) -> None:
    folder = run(tmp_path, "--no-simulation", "--tables", "t13,t21")
    found, lost = rows_of(folder, "t13")
    assert (found["printed"], found["printed_evidence"], found["trust"]) == (
        "0.01",
        "QUOTED",
        "copy",
    )
    assert (lost["printed"], lost["printed_evidence"], lost["trust"]) == ("not found", "-", "")
    assert "| printed | - | not found |" in (folder / "t21.md").read_text()


def test_a_footnote_stands_at_its_cells_and_is_numbered_as_one_reads(tmp_path: Path) -> None:
    folder = run(tmp_path, "--no-simulation", "--tables", "t10")
    page = (folder / "t10.md").read_text()
    line = next(x for x in page.splitlines() if "DBLP-GoogleScholar" in x)
    assert "| 232.65 \\[1\\] | 1097.78 \\[1\\] | 1271.534 |" in line
    assert page.count("\\[1\\]") == 2
    assert "\n1. Inconsistent as printed" in page
    assert "1097.78\\textsuperscript{1}" in (folder / "t10.tex").read_text()
    page = (run(tmp_path, "--no-simulation", "--tables", "t2") / "t2.md").read_text()
    met = re.findall(r"\\\[([\d,]+)\\\]", page[: page.index("\n1. ")])
    first = list(dict.fromkeys(n for group in met for n in group.split(",")))
    assert first == sorted(first, key=int)
    assert len(re.findall(r"^\d+\. ", page, re.M)) == len(first)


# --- what stands beside


def test_simulations_stand_beside_printed_values(
    tmp_path: Path, fakes: list[ConfiguredSystem]
) -> None:
    folder = run(tmp_path, "--tables", "t2,t3")
    rows = rows_of(folder, "t2")
    printed = {"table": "T2", "prompt_len": "512"}
    row = only(rows, system="FlexGen", model="OPT-30B", **printed)
    # 144 prompts of 32 tokens in 2 x 144 s; this engine's block is 2: 64 tokens in 0.4 s.
    assert (row["simulated"], row["simulated_evidence"], row["simulated_source"]) == (
        "16",
        "SIMULATED",
        "two",
    )
    assert row["simulated_ratio"] == f"{16 / 7.32:.2f}"
    assert (row["ours"], row["ours_ratio"], row["ours_lossy"]) == (
        "160",
        f"{160 / 7.32:.1f}",
        "exact",
    )
    row = only(rows, system="FlexGen(c)", model="OPT-175B", **printed)
    assert (row["simulated"], row["ours"]) == ("16", "160")
    assert row["ours_lossy"] == "4-bit weights, 4-bit KV"
    row = only(rows, system="FlexGen", model="OPT-175B", **printed)
    assert (row["simulated"], row["ours"], row["simulated_ratio"]) == ("OOM", "OOM", "")
    assert row["simulated_evidence"] == "SIMULATED"
    row = only(rows, system="Accelerate", model="OPT-30B", **printed)
    assert (row["simulated"], row["ours"]) == ("16", "-")
    assert (
        only(rows, system="DeepSpeed ZeRO-Inference", model="OPT-30B", **printed)["simulated"]
        == "no model"
    )
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


def test_systems_are_asked_in_their_own_words(
    tmp_path: Path, fakes: list[ConfiguredSystem]
) -> None:
    run(tmp_path, "--tables", "t2")
    asked = [
        (options, q) for options, q in FakePredictor.asked
        if q.shape.name == "opt-30b" and q.prompt_len == 512
    ]  # fmt: skip
    (options, question), *others = [a for a in asked if a[0].get("num_gpu_batches") == 3]
    assert not others
    assert options == {
        "percent": [20, 80, 0, 100, 0, 100], "gpu_batch_size": 48, "num_gpu_batches": 3, "cpu_cache_compute": True,
        "pin_weight": True, "overlap": True, "sep_layer": None,
    }  # fmt: skip
    assert (question.num_prompts, question.lossy, question.dtype.value) == (None, EXACT, "float16")
    assert question.hardware.name == "t4"
    (_, question), *_ = [a for a in asked if a[0].get("num_gpu_batches") == 20]
    assert question.lossy == Lossy(kv_cache=FOUR), "OPT-30B compresses its KV cache alone"
    assert [o for o, _ in asked if "offload" in o] == [{"offload": "cpu", "batch_size": 8}]
    ours = [q.lossy for o, q in asked if "policy" in o]
    assert ours == [EXACT, Lossy(weights=FOUR, kv_cache=FOUR)]


def test_no_question_is_asked_twice(tmp_path: Path, fakes: list[ConfiguredSystem]) -> None:
    run(tmp_path)
    asked = [repr((sorted(o.items()), q)) for o, q in FakePredictor.asked]
    assert len(asked) > 100
    assert len(set(asked)) == len(asked)


def test_answers_are_kept_until_something_that_decides_them_changes(
    tmp_path: Path, fakes: list[ConfiguredSystem], capsys: pytest.CaptureFixture[str]
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
    fakes[0] = system(
        "one", "Accelerate", fakes[0].options, choices=fakes[0].choices, constants={"slow": 2.0}
    )
    row = only(
        rows_of(run(tmp_path, "--tables", "t2"), "t2"),
        system="Accelerate",
        model="OPT-30B",
        prompt_len="512",
    )
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
    tmp_path: Path, fakes: list[ConfiguredSystem], capsys: pytest.CaptureFixture[str], damage: Any
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
    tmp_path: Path, fakes: list[ConfiguredSystem]
) -> None:
    fakes[1] = engine_that("overlaps", "kv_alone")
    first = rows_of(run(tmp_path, "--tables", "t2,t3"), "t3")
    asked = len(FakePredictor.asked)
    assert rows_of(run(tmp_path, "--tables", "t2,t3"), "t3") == first
    assert len(FakePredictor.asked) == asked


def engine_that(*does: str) -> ConfiguredSystem:
    constants = {"slow": 0.1, **dict.fromkeys(does, 1.0)}
    return system("flexgen", "FlexGen", {"policy": None}, constants=constants)


def test_phases_that_overlap_have_no_throughput_of_their_own(
    tmp_path: Path, fakes: list[ConfiguredSystem]
) -> None:
    """The decoding of this engine's continuous jobs, prefill included, was divided by the paper's decoding alone."""
    fakes[1] = engine_that("overlaps")
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
    tmp_path: Path, fakes: list[ConfiguredSystem]
) -> None:
    """Where the search chose to compress the KV cache alone, the row said weights, too: they were permitted."""
    fakes[1] = engine_that("kv_alone")
    folder = run(tmp_path, "--tables", "t2,t15,t16,fig1")
    row = only(rows_of(folder, "t2"), system="FlexGen(c)", model="OPT-30B", table="T2", prompt_len="512")  # fmt: skip
    assert row["ours_lossy"] == "4-bit KV"
    for name in ("t2", "t15", "t16", "fig1"):
        page = (folder / f"{name}.md").read_text()
        assert "this engine, 4-bit KV" in page, name
        assert "4-bit weights, 4-bit KV" not in page, name


def test_a_record_of_blocks_that_overlap_tells_no_phases(
    tmp_path: Path, fakes: list[ConfiguredSystem]
) -> None:
    policy = Policy(8, 4, schedule=Schedule.CONTINUOUS)
    put(tmp_path, paper_cell("flexgen"), report=SystemReport(requested=policy.to_dict()))
    rows = rows_of(run(tmp_path, "--tables", "t3"), "t3")
    where = {"system": "FlexGen", "model": "OPT-30B", "gpus": "1"}
    whole = only(rows, metric="generation throughput", **where)
    assert (whole["ours"], whole["ours_evidence"]) == ("16", "MEASURED")
    assert only(rows, metric="decoding throughput", **where)["ours"] == "-"


def test_an_answer_depends_on_the_code_that_gave_it(
    tmp_path: Path, fakes: list[ConfiguredSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, "--tables", "t2")
    asked = len(FakePredictor.asked)
    monkeypatch.setattr(answers, "_code", lambda predictor: "another")
    run(tmp_path, "--tables", "t2")
    assert len(FakePredictor.asked) == 2 * asked
    monkeypatch.undo()
    digests = {
        answers._code(p)
        for p in ("paper_fakes:FakePredictor", "flexgen_bench.planner.x:X", "baselines.x:X")
    }
    assert len(digests) == 3
    assert answers._code("flexgen_bench.planner.y:Y") in digests


def test_several_processes_say_what_one_says(tmp_path: Path, fakes: list[ConfiguredSystem]) -> None:
    one = run(tmp_path / "one", "--tables", "t2")
    two = run(tmp_path / "two", "--tables", "t2", "--workers", "2")
    assert (one / "t2.csv").read_bytes() == (two / "t2.csv").read_bytes()
    kept = [(tmp_path / n / "results" / "predictions.json").read_bytes() for n in ("one", "two")]
    assert kept[0] == kept[1]


def test_jobs_have_the_prompts_that_were_run(tmp_path: Path, fakes: list[ConfiguredSystem]) -> None:
    folder = run(tmp_path, "--tables", "t10,t9,t3")
    row = only(
        rows_of(folder, "t10"),
        model="OPT-30B",
        metric="data wrangling total time: EM Fodors-Zagats",
    )
    assert row["simulated"] == f"{2 * 60}", "a block is 60; the prompts are 180"
    lens = {(q.prompt_len, q.num_prompts) for o, q in FakePredictor.asked if "policy" in o}
    assert (744, 180) in lens
    assert (1984, 1568) in lens
    assert (512, 864) in lens
    of_four = {q.num_prompts for o, q in FakePredictor.asked if q.num_gpus == 4 and "percent" in o}
    assert of_four == {96, 768, 160}


def paper_cell(name: str, machine: str = "t4", **changes: Any) -> Any:
    return make_spec(
        name,
        model=ModelSpec(model_spec("opt-30b").shape),
        workload=Workload(
            "512-32", PromptKind.SYNTHETIC, num_prompts=64, prompt_len=512, gen_len=32
        ),
        hardware=hardware_profile(machine),
        **changes,
    )


def put(tmp_path: Path, spec: Any, run_number: int = 0, **changes: Any) -> Path:
    """A record of ``spec``: 64 prompts of 32 tokens in 128 s."""
    samples = (Sample(28.0, 100.0, 64 * 512, 64 * 32, 64 * 31),)
    values: dict[str, Any] = {"samples": samples, "batch_size": 64, "run": run_number}
    record = make_record(spec.system, spec=spec, **(values | changes))
    return write_record(record, tmp_path / "results")


def test_a_record_of_the_same_job_takes_the_place_of_a_simulation(
    tmp_path: Path, fakes: list[ConfiguredSystem]
) -> None:
    path = put(tmp_path, paper_cell("flexgen"))
    put(tmp_path, paper_cell("flexgen", machine="a100"))
    put(tmp_path, paper_cell("flexgen", lossy=Lossy(weights=FOUR)))
    folder = run(tmp_path, "--tables", "t2")
    row = only(rows_of(folder, "t2"), system="FlexGen", model="OPT-30B", prompt_len="512")
    assert (row["ours"], row["ours_evidence"], row["ours_ratio"]) == (
        "16",
        "MEASURED",
        f"{16 / 7.32:.2f}",
    )
    assert row["ours_source"] == path.relative_to(tmp_path / "results").as_posix()
    others = [r for r in rows_of(folder, "t2") if r["ours_evidence"] == "MEASURED"]
    assert others == [row], "another machine and another compression are other jobs"
    page = (folder / "t2.md").read_text()
    assert "| this engine | SIMULATED and MEASURED |" in page
    assert "160 (S) (6.33x)" in page, "two kinds in a line are marked"


@pytest.mark.parametrize("evidence", [Evidence.EMULATED, Evidence.PROJECTED])
def test_the_evidence_of_a_record_is_its_own(
    tmp_path: Path, fakes: list[ConfiguredSystem], evidence: Evidence
) -> None:
    put(tmp_path, paper_cell("flexgen"), evidence=evidence)
    folder = run(tmp_path, "--tables", "t2")
    row = only(rows_of(folder, "t2"), system="FlexGen", model="OPT-30B", prompt_len="512")
    assert row["ours_evidence"] == evidence.value
    assert f"16.0 ({evidence.value[0]}) (2.19x)" in (folder / "t2.md").read_text()


def test_a_record_counts_for_the_policy_it_ran_with(
    tmp_path: Path, fakes: list[ConfiguredSystem]
) -> None:
    ran = {
        "percent": [20, 80, 0, 100, 0, 100], "gpu_batch_size": 48, "num_gpu_batches": 3, "cpu_cache_compute": True,
        "pin_weight": True, "overlap": False,
    }  # fmt: skip
    put(tmp_path, paper_cell("two"), report=SystemReport(requested=ran))
    rows = rows_of(run(tmp_path, "--tables", "t4"), "t4")
    measured = [r["system"] for r in rows if r["simulated_evidence"] == "MEASURED"]
    assert measured == ["FlexGen: no overlapping"]


def test_a_run_out_of_memory_is_a_result_and_a_failed_one_is_none(
    tmp_path: Path, fakes: list[ConfiguredSystem]
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


# --- the files


def test_twice_gives_the_same_bytes_wherever_it_runs(
    tmp_path: Path, fakes: list[ConfiguredSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, paper_cell("flexgen"))
    (tmp_path / "results" / "default" / "bad--x--y--0--1.json").write_text("{")
    first = run(tmp_path)
    kept = {p.name: p.read_bytes() for p in first.iterdir()}
    names = [f"{n}.{e}" for n in list_tables() for e in ("md", "csv", "tex")]
    plots = ["fig1-30b.svg", "fig1-175b.svg", "fig4-latency.svg", "fig4-throughput.svg"]
    assert sorted(kept) == sorted([*names, *plots, "index.md"])
    monkeypatch.chdir(tmp_path)
    assert main(["results", "again", "--workers", "1"]) == 0
    again = {p.name: p.read_bytes() for p in (tmp_path / "again" / "paper").iterdir()}
    assert again == kept
    assert not [n for n, data in kept.items() if str(tmp_path).encode() in data]
    index = kept["index.md"].decode()
    assert "bad--x--y--0--1.json is not a whole JSON document" in index
    assert all(f"({name}.md)" in index for name in list_tables())


def test_latex_is_well_formed(tmp_path: Path, fakes: list[ConfiguredSystem]) -> None:
    folder = run(tmp_path)
    for path in sorted(folder.glob("*.tex")):
        text = path.read_text()
        opened: list[str] = []
        for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
            if kind == "begin":
                opened.append(name)
            else:
                assert opened.pop() == name, path
        assert not opened
        body = re.sub(r"\\[\\{}%&#_$]", "", "\n".join(x for x in text.splitlines() if x[0] != "%"))
        assert body.count("{") == body.count("}"), path
        assert not re.search(r"[~^_#](?!\\)", re.sub(r"\}~", "}", body)), path
        for tabular in re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", text, re.S):
            spec = tabular.splitlines()[0].removeprefix(r"\begin{tabular}{@{}")
            spec = re.sub(r">\{[^}]*\}p\{[^}]*\}", "p", spec).removesuffix("@{}}")
            for line in (x for x in tabular.splitlines() if x.endswith(r"\\")):
                spans = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line))
                assert len(re.findall(r"(?<!\\)&", line)) + 1 + spans == len(spec), (path, line)


def test_signs_of_latex_are_escaped() -> None:
    assert latex_escape("50% of {a_b} & #1 ~^\\") == (
        r"50\% of \{a\_b\} \& \#1 \textasciitilde{}\textasciicircum{}\textbackslash{}"
    )


def test_plots_show_every_point(tmp_path: Path, fakes: list[ConfiguredSystem]) -> None:
    folder = run(tmp_path, "--tables", "fig4,fig1")
    root = ET.fromstring((folder / "fig4-throughput.svg").read_text())
    ns = "{http://www.w3.org/2000/svg}"
    texts = [t.text or "" for t in root.iter(f"{ns}text")]
    assert "throughput per GPU (token/s)" in texts
    assert "FlexGen, block of 128, printed (QUOTED)" in texts
    assert "FlexGen, block of 128, simulated (SIMULATED)" in texts
    lines = [p.get("points", "").split() for p in root.iter(f"{ns}polyline")]
    assert [len(points) for points in lines] == [10] * 6
    # Higher throughput is higher up, and more tokens are further right.
    xs, ys = zip(*(map(float, p.split(",")) for p in lines[0]), strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys, reverse=True)
    root = ET.fromstring((folder / "fig1-175b.svg").read_text())
    assert any("This engine (c) (SIMULATED)" in (t.text or "") for t in root.iter(f"{ns}text"))


# --- a new table, and what can be wrong with it

OWN = """
title: "HELM, as the authors' logs have it"
printed: [T9-log]
rows: [item]
columns: [model]
models: {OPT-IML-30B: opt-30b}
systems: {FlexGen: {ours: {}}}
predict: {"HELM running time (author log)": total_min}
assumed: [{where: {quantity: HELM running time (author log)}, num_prompts: 64, source: nobody}]
"""


def own(tmp_path: Path, text: str, name: str = "mine") -> str:
    folder = tmp_path / "own" / "table"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(text)
    return str(tmp_path / "own")


def test_a_new_table_is_one_file(tmp_path: Path, fakes: list[ConfiguredSystem]) -> None:
    folder = run(tmp_path, "--config-dir", own(tmp_path, OWN))
    rows = rows_of(folder, "mine")
    assert len(rows) == 14
    row = only(rows, model="OPT-30B", prompt_len="1984")
    assert (row["printed"], row["simulated"]) == ("1100", f"{2 * 32 / 60:.6g}")
    assert "(mine.md)" in (folder / "index.md").read_text()
    assert (folder / "t2.md").is_file()


def test_the_table_of_the_notes_is_right(tmp_path: Path, fakes: list[ConfiguredSystem]) -> None:
    """Its minutes were those of a block beside the paper's of a whole run, a tenth of them."""
    notes = (Path(__file__).parents[1] / "docs" / "notes" / "paper_tables.md").read_text()
    example = textwrap.dedent(notes.partition("```yaml\n")[2].partition("  ```")[0])
    assert example.startswith("# conf/table/mine.yaml")
    folder = run(tmp_path, "--config-dir", own(tmp_path, example), "--tables", "mine")
    rows = rows_of(folder, "mine")
    assert {r["printed"] for r in rows} == {"1100"}
    assert {r["model"] for r in rows} == {"OPT-30B", "OPT-IML-30B"}
    assert {r["simulated_evidence"] for r in rows} == {r["ours_evidence"] for r in rows}
    assert {q.num_prompts for _, q in FakePredictor.asked} == {1568}


@pytest.mark.parametrize("quantity", ["total_min", "total_s", "prefill_s", "decode_s"])
def test_a_time_of_a_job_of_unknown_size_is_refused(
    tmp_path: Path, fakes: list[ConfiguredSystem], capsys: pytest.CaptureFixture[str], quantity: str
) -> None:
    text = OWN[: OWN.index("assumed")].replace("total_min", quantity)
    run(tmp_path, "--config-dir", own(tmp_path, text), "--tables", "mine", status=2)
    said = capsys.readouterr().err
    assert (
        f"table.predict.HELM running time (author log): wikifact plaintiff = '{quantity}'" in said
    )
    assert "state num_prompts for these rows under assumed" in said


def test_a_table_added_to_conf_is_found(
    tmp_path: Path, fakes: list[ConfiguredSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "conf"
    shutil.copytree(conf_dir(), copy)
    (copy / "table" / "t25.yaml").write_text(
        "title: Table 25\nprinted: [T25]\nrows: [item]\ncolumns: [quantity]\ngrids: unit\n"
    )
    for module in ("table_conf", "config"):
        monkeypatch.setattr(f"flexgen_bench.{module}.conf_dir", lambda: copy)
    folder = run(tmp_path)
    assert "251.5" in (folder / "t25.md").read_text()
    assert "t25.md" in (folder / "index.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rows:", "rwos:"), "Did you mean 'rows'"),
        (("title:", "#title:"), "title"),
        (("[item]", "[itme]"), "table.rows = 'itme': must be one of"),
        (("[model]", "[]"), "table.columns"),
        (("[T9-log]", "[T9-lgo]"), "table.printed = 'T9-lgo'"),
        (("total_min", "minutes"), "table.predict.HELM running time (author log) = 'minutes'"),
        (("{ours: {}}", "{simulated_as: FlexGne}"), "Did you mean 'FlexGen'"),
        (("{ours: {}}", "{ours: {weights: 5}}"), "weights = 5"),
        (("{FlexGen: {", "{Flexgen: {"), "table.systems = 'Flexgen'"),
        (("{OPT-IML-30B:", "{OPT-IML:"), "table.models = 'OPT-IML'"),
        (("title:", "engine: nobody\ntitle:"), "table.engine = 'nobody'"),
        (("title:", "lines: [prinetd]\ntitle:"), "Did you mean 'printed'"),
        (("title:", "decimals: many\ntitle:"), "decimals"),
        (("title:", "select: {model: [OPT-31B]}\ntitle:"), "table.select.model = 'OPT-31B'"),
        (("title:", "notes: [{key: gbi}]\ntitle:"), "Did you mean 'gib'"),
        (("title:", "notes: [{text: x, where: {model: OPT}}]\ntitle:"), "met by a cell"),
        (("title:", "notes: [{where: {model: OPT-30B}}]\ntitle:"), "either text or key"),
        (("title:", "machine: t5\ntitle:"), "gpu = 't5'"),
        (("title:", "extra: [{metric: x, value: 1s}]\ntitle:"), "table.extra[0], value = '1s'"),
        (("title:", "figures: [{name: f, title: f, x: a, y: b}]\ntitle:"), "table.figures.f.y"),
        (("title:", "figures: [{name: ../f, title: f, x: a, y: b}]\ntitle:"), "table.figures.name"),
        (("title:", "title: [\ntitle:"), "readable YAML"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_is_explained_and_hides_no_other(
    tmp_path: Path, fakes: list[ConfiguredSystem], capsys: pytest.CaptureFixture[str],
    change: tuple[str, str], message: str,
) -> None:  # fmt: skip
    folder = own(tmp_path, OWN.replace(*change))
    made = run(tmp_path, "--config-dir", folder, "--tables", "mine,t5", status=2)
    said = [x for x in capsys.readouterr().err.splitlines() if "predictions to make" not in x]
    assert len(said) == 1, "one line, no traceback"
    assert message in said[0]
    assert "mine.yaml" in said[0]
    assert (made / "t5.md").is_file()
    assert not (made / "mine.md").exists()


def test_an_unknown_table_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = run(tmp_path, "--tables", "t2,t99", status=2)
    said = capsys.readouterr().err
    assert "table = 't99': must be one of" in said
    assert "t16" in said
    assert not made.exists()
    run(tmp_path, "--config-dir", str(tmp_path / "absent"), status=2)
    assert "--config-dir" in capsys.readouterr().err


ROW = {
    "table": "T2", "system": "FlexGen", "model": "OPT-30B", "prompt_len": "512", "gen_len": "32", "gpus": "1",
    "metric": "generation throughput", "value": "7.32", "unit": "token/s", "policy": "bs=48x3", "source": "V2 [exact]",
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("value", "fast", "line 2, value = 'fast'"),
        ("value", "nan", "line 2, value"),
        ("value", "", "line 2, value"),
        ("prompt_len", "many", "line 2, prompt_len = 'many'"),
        ("gpus", "-1", "line 2, gpus"),
        ("metric", "", "line 2, metric"),
        ("source", "V2", "square brackets"),
        ("source", "V2 [sure]", "square brackets"),
        ("policy", "bs=48", "line 2, policy = 'bs=48'"),
        ("policy", "bs=1x1; pct=60 60 0 100 0 100", "at most 100"),
    ],
)
def test_a_broken_printed_row_is_named(
    tmp_path: Path, field: str, value: str, message: str
) -> None:
    path = tmp_path / "tables.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, list((ROW | {field: value}).values())])
    with pytest.raises(UserError, match=re.escape(message)):
        read_quoted(path)


def test_a_csv_with_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tables.csv"
    path.write_text(",".join(COLUMNS[:-1]) + "\n")
    with pytest.raises(UserError, match="header"):
        read_quoted(path)
    path.write_text(",".join(COLUMNS) + "\nT2,FlexGen\n")
    with pytest.raises(UserError, match=r"line 2.*11 values"):
        read_quoted(path)


def test_broken_records_are_named_and_hide_no_other(
    tmp_path: Path, fakes: list[ConfiguredSystem]
) -> None:
    good = put(tmp_path, paper_cell("flexgen"))
    text = good.read_text()
    newer = good.with_name("newer--x--y--0--1.json")
    newer.write_text(re.sub(r'"schema_version": \d+', '"schema_version": 99', text))
    older = good.with_name("older--x--y--0--1.json")
    older.write_text(re.sub(r'"schema_version": \d+', '"schema_version": 0', text))
    good.with_name("torn--x--y--0--1.json").write_text(text[:100])
    lost = replace(make_record("flexgen"), spec_hash="0" * 16, spec={"system": "flexgen"})
    odd = write_record(lost, tmp_path / "results")
    folder = run(tmp_path)
    index = (folder / "index.md").read_text().replace("\\", "")
    assert "newer--x--y--0--1.json is not a usable record: has schema version 99" in index
    assert "older--x--y--0--1.json is not a usable record: has schema version 0" in index
    assert "torn--x--y--0--1.json is not a whole JSON document" in index
    assert f"{odd.name}: its spec is not that of a cell" in index
    row = only(rows_of(folder, "t2"), system="FlexGen", model="OPT-30B", prompt_len="512")
    assert row["ours_evidence"] == "MEASURED"


# --- policies as text


def test_every_printed_policy_can_be_read() -> None:
    for row in PRINTED:
        policy = parse_policy(row.policy)
        if "bs=" in row.policy:
            assert policy.is_policy
            assert f"bs={policy.gpu_batch_size}x{policy.num_gpu_batches}" in row.policy
        if row.table == "T15":
            assert policy.block_size == row.number, "the printed block is the policy's"
        if row.table == "T9" and row.quantity == "sequences run":
            assert policy.block_size is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bs=48x3; pct=20 80 0 100 0 100; cpu attention", {"percent": (20, 80, 0, 100, 0, 100), "cpu_attention": True, "block_size": 144}),
        ("bs=32x8; pct=0 50 0 0 0 100; gpu attention; pin 0; overlap off", {"pin_weight": False, "overlap": False, "weights_on": "disk", "cpu_attention": False}),
        ("bs=72x1; compress w+kv; overlap off in repo", {"lossy": Lossy(FOUR, FOUR), "overlap": False}),
        ("compress kv only; bs=16x20", {"lossy": Lossy(kv_cache=FOUR), "block_size": 320}),
        ("bs=40x1; pipeline 4x1; inner 4 [repo scripts, not confirmed]", {"stages": 4, "num_prompts": 160, "origin": "repo scripts, not confirmed"}),
        ("bs=24x1; pipeline 4x1; comm gpu", {"num_prompts": 96, "remarks": ("comm gpu",)}),
        ("total batch 48; cpu offload", {"block_size": 48, "weights_on": "cpu", "is_policy": True}),
        ("bs=96x3; eval instances=850; 3 train trials", {"num_prompts": 2592}),
        ("bs=20x3; tested samples=189; executed=180", {"num_prompts": 180, "tested": 189}),
        ("effective batch=144", {"block_size": 144, "is_policy": False}),
        ("", {"is_policy": False, "remarks": (), "lossy": EXACT}),
    ],
)  # fmt: skip
def test_a_policy_text_means(text: str, expected: dict[str, Any]) -> None:
    policy = parse_policy(text)
    assert {name: getattr(policy, name) for name in expected} == expected


PARTS = {
    "cpu attention": ("cpu_attention", True),
    "overlap off": ("overlap", False),
    "pin 0": ("pin_weight", False),
    "compress w+kv": ("lossy", Lossy(FOUR, FOUR)),
    "pct=0 50 0 0 0 100": ("percent", (0, 50, 0, 0, 0, 100)),
    "inner 4": ("inner", 4),
    "some remark": ("remarks", ("some remark",)),
}


@given(
    st.integers(1, 999),
    st.integers(1, 99),
    st.lists(st.sampled_from(sorted(PARTS)), unique=True).flatmap(st.permutations),
    st.sampled_from([";", "; ", " ;  "]),
)
def test_parts_of_a_policy_mean_the_same_in_any_order(
    gpu_batch: int, batches: int, parts: list[str], separator: str
) -> None:
    policy = parse_policy(separator.join([f"bs={gpu_batch}x{batches}", *parts]))
    assert policy == parse_policy("; ".join([*reversed(parts), f"bs={gpu_batch}x{batches}"]))
    assert policy.block_size == gpu_batch * batches
    default = parse_policy("")
    for part, (name, value) in PARTS.items():
        assert getattr(policy, name) == (value if part in parts else getattr(default, name))


@pytest.mark.parametrize(
    "text",
    ["bs=48", "bs=0x3", "bs=4 x 3", "pct=1 2 3", "pct=a b c d e f", "pct=60 50 0 0 0 0", "overlap maybe", "pin 1x",
     "compress everything", "executed=none", "executed=0", "pipeline four", "inner -1", "bs=1x1; bs=2x2", "cpu attention; gpu attention"],
)  # fmt: skip
def test_a_slip_in_a_policy_is_no_remark(text: str) -> None:
    with pytest.raises(UserError, match="policy"):
        parse_policy(text)


@given(st.text(max_size=40))
def test_any_other_text_is_kept_or_refused(text: str) -> None:
    try:
        policy = parse_policy(text)
    except UserError:
        return
    kept = "".join((*policy.remarks, policy.origin))
    if not policy.is_policy and policy == parse_policy("; ".join(policy.remarks)):
        assert all(word in kept for word in text.replace(";", " ").split() if word.isalpha())


# --- what is there


def test_every_table_of_conf_builds_without_simulation(tmp_path: Path) -> None:
    folder = run(tmp_path, "--no-simulation")
    for name in list_tables():
        conf = table_conf(name)
        rows = rows_of(folder, name)
        assert rows, name
        assert {r["simulated_evidence"] for r in rows} == {"-"}
        wanted = [
            r
            for r in PRINTED
            if r.table in conf.printed and all(r.text(f) in v for f, v in conf.select.items())
        ]
        shown = [(r["table"], r["system"], r["model"], r["metric"], r["printed"]) for r in rows]
        for row in wanted:
            key = (
                row.table,
                row.system,
                row.model,
                row.metric,
                "not found" if row.value == "NOT FOUND" else row.value,
            )
            assert key in shown
    assert {"t1", "t2", "t3", "t4", "t5", "t8", "t9", "t10", "t15", "t16", "fig4"} <= set(
        list_tables()
    )


def test_no_printed_number_is_in_the_code() -> None:
    """Facts stand in conf: the code knows no value of the paper."""
    folder = Path(build.__file__).parent
    known = {"7.32", "25.26", "0.69", "8.38", "8.70", "1.12", "0.0084"}
    for path in folder.glob("*.py"):
        numbers = set(re.findall(r"\d+\.\d+", path.read_text()))
        assert not numbers & known, path


def test_quoted_fields_cover_the_csv() -> None:
    row = Quoted(*itertools.repeat("", len(COLUMNS)))
    assert [row.text(f) for f in ("quantity", "item", "block")] == ["", "", ""]
    assert SHAPE.name == "tiny"
