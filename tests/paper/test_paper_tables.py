"""The files of the paper's tables: the same bytes every time, LaTeX, plots, and every table of conf."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from flexgen_bench.cli.report import main
from flexgen_bench.config.table import ConfiguredSystem, list_tables, table_conf
from flexgen_bench.paper import build
from flexgen_bench.paper.latex import escape as latex_escape
from flexgen_bench.published.quoted import COLUMNS, Quoted
from tests.support.paper_report import PRINTED, paper_cell, put, rows_of, run
from tests.support.record_factory import SHAPE


def test_twice_gives_the_same_bytes_wherever_it_runs(
    tmp_path: Path, fake_systems: list[ConfiguredSystem], monkeypatch: pytest.MonkeyPatch
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


def test_latex_is_well_formed(tmp_path: Path, fake_systems: list[ConfiguredSystem]) -> None:
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


def test_plots_show_every_point(tmp_path: Path, fake_systems: list[ConfiguredSystem]) -> None:
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


def test_every_table_of_conf_builds_without_simulation(tmp_path: Path) -> None:
    folder = run(tmp_path, "--no-simulation")
    for name in list_tables():
        conf = table_conf(name)
        rows = rows_of(folder, name)
        assert rows, name
        assert {r["simulated_evidence"] for r in rows} == {"-"}
        wanted = [r for r in PRINTED if r.table in conf.printed and all(r.text(f) in v for f, v in conf.select.items())]
        shown = [(r["table"], r["system"], r["model"], r["metric"], r["printed"]) for r in rows]
        for row in wanted:
            key = (row.table, row.system, row.model, row.metric, "not found" if row.value == "NOT FOUND" else row.value)
            assert key in shown
    assert {"t1", "t2", "t3", "t4", "t5", "t8", "t9", "t10", "t15", "t16", "fig4"} <= set(list_tables())


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
