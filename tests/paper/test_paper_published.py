"""What the paper printed, in its tables here: every value with its trust, and what the paper contradicts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flexgen_bench.config.table import paper_dir
from flexgen_bench.core.errors import UserError
from flexgen_bench.published.quoted import read_papers
from flexgen_bench.report.table import escape as markdown_escape
from tests.support.paper_report import PRINTED, only, rows_of, run


def test_the_printed_values_are_read_with_their_trust() -> None:
    assert len(PRINTED) > 400
    assert {r.trust.replace(",", " ").split()[0] for r in PRINTED if r.value != "NOT FOUND"} == {
        "exact",
        "copy",
        "digitised",
        "derived",
        "reconstructed",
    }
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
    grid = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert grid[0][3:] == [f"prompt {p}, {m}" for p in ("512", "1024") for m in ("6.7B", "30B", "175B")]
    assert [line[0] for line in grid[2:7]] == [
        "**Accelerate**",
        "**DeepSpeed**",
        "**Petals**",
        "**FlexGen**",
        "**FlexGen (c)**",
    ]
    assert [cell.split()[0] for cell in grid[5][3:]] == ["25.26", "7.32", "0.69", "13.72", "3.50", "0.35"]
    assert "8.70 \\[" in grid[6][4]
    assert "8.38 \\[" in grid[6][4]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            "t2",
            [
                "two policies: 8.70",
                "total throughput divided by the number of GPUs",
                "KV cache alone",
                "GB are GiB",
                "is a rounding",
                "8.2 %",
            ],
        ),
        ("t3", ["nothing confirms", "page cache"]),
        ("t4", ["6.93 with"]),
        ("t8", ["3249 s against 2711", "page cache, or reading several files"]),
        ("t10", ["imply 210.7 samples"]),
        ("t13", ["not found"]),
        ("t21", ["not found"]),
        ("cost", [re.escape("4.2 times"), "4.09"]),
        ("fig4", ["different runs", "too high by about 0.05"]),
        ("t5", ["not measured yet"]),
    ],
)
def test_what_the_paper_contradicts_is_said(tmp_path: Path, table: str, words: list[str]) -> None:
    folder = run(tmp_path, "--no-simulation", "--tables", table)
    for suffix in ("md", "tex") if table != "t5" else ("md",):
        text = (folder / f"{table}.{suffix}").read_text().replace("\\%", "%")
        for word in words:
            assert re.search(word, text), (suffix, word)


def test_a_value_that_nobody_found_is_no_quotation(tmp_path: Path) -> None:
    folder = run(tmp_path, "--no-simulation", "--tables", "t13,t21")
    found, lost = rows_of(folder, "t13")
    assert (found["printed"], found["printed_evidence"], found["trust"]) == ("0.01", "QUOTED", "copy")
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


def test_two_papers_do_not_share_a_table(tmp_path: Path) -> None:
    """Rows are found by their table alone, whichever paper they are from."""
    text = (paper_dir() / "moe_lightning.csv").read_text()
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"two.csv, table"):
        read_papers(tmp_path)


def test_moe_lightning_agrees_with_itself() -> None:
    """Its abstract: up to 10.3 times the best of the baselines, on a T4; its Table 5 repeats two bars of Figure 7."""
    values = {(r.system, r.gen_len): r.number or 0 for r in PRINTED if r.table == "ML-F7-S1"}
    best = max(values["MoE-Lightning", n] / values["FlexGen", n] for n in ("32", "64", "128", "256"))
    assert round(best, 1) == 10.3
    again = {r.system: r.number or 0 for r in PRINTED if r.table == "ML-T5"}
    assert round(again["MoE-Lightning(p)"], 1) == values["MoE-Lightning(p)", "128"]
    assert again["FlexGen, its policy"] == values["FlexGen", "128"]
