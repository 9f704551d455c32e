"""A new table is one file, and what can be wrong with it, or with what it reads, is told by name."""

from __future__ import annotations

import csv
import re
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_bench.config.paths import conf_dir
from flexgen_bench.config.table import ConfiguredSystem
from flexgen_bench.core.errors import UserError
from flexgen_bench.published.quoted import COLUMNS, read_quoted
from flexgen_bench.store.writer import write_record
from tests.support.paper_fakes import FakePredictor
from tests.support.paper_report import only, own, paper_cell, put, rows_of, run
from tests.support.record_factory import make_record

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


def test_a_new_table_is_one_file(tmp_path: Path, fake_systems: list[ConfiguredSystem]) -> None:
    folder = run(tmp_path, "--config-dir", own(tmp_path, OWN))
    rows = rows_of(folder, "mine")
    assert len(rows) == 14
    row = only(rows, model="OPT-30B", prompt_len="1984")
    assert (row["printed"], row["simulated"]) == ("1100", "1.067")
    assert "(mine.md)" in (folder / "index.md").read_text()
    assert (folder / "t2.md").is_file()


def test_the_table_of_the_notes_is_right(tmp_path: Path, fake_systems: list[ConfiguredSystem]) -> None:
    """Its minutes were those of a block beside the paper's of a whole run, a tenth of them."""
    notes = (Path(__file__).parents[2] / "docs" / "guides" / "paper_tables.md").read_text()
    example = textwrap.dedent(notes.partition("```yaml\n")[2].partition("```")[0])
    assert example.startswith("# conf/table/mine.yaml")
    folder = run(tmp_path, "--config-dir", own(tmp_path, example), "--tables", "mine")
    rows = rows_of(folder, "mine")
    assert {r["printed"] for r in rows} == {"1100"}
    assert {r["model"] for r in rows} == {"OPT-30B", "OPT-IML-30B"}
    assert {r["simulated_evidence"] for r in rows} == {r["ours_evidence"] for r in rows}
    assert {q.num_prompts for _, q in FakePredictor.asked} == {1568}


@pytest.mark.parametrize("quantity", ["total_min", "total_s", "prefill_s", "decode_s"])
def test_a_time_of_a_job_of_unknown_size_is_refused(
    tmp_path: Path, fake_systems: list[ConfiguredSystem], capsys: pytest.CaptureFixture[str], quantity: str
) -> None:
    text = OWN[: OWN.index("assumed")].replace("total_min", quantity)
    run(tmp_path, "--config-dir", own(tmp_path, text), "--tables", "mine", status=2)
    said = capsys.readouterr().err
    assert f"table.predict.HELM running time (author log): wikifact plaintiff = '{quantity}'" in said
    assert "state num_prompts for these rows under assumed" in said


def test_a_table_added_to_conf_is_found(
    tmp_path: Path, fake_systems: list[ConfiguredSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "conf"
    shutil.copytree(conf_dir(), copy)
    (copy / "table" / "t25.yaml").write_text(
        "title: Table 25\nprinted: [T25]\nrows: [item]\ncolumns: [quantity]\ngrids: unit\n"
    )
    for module in ("table", "paths"):
        monkeypatch.setattr(f"flexgen_bench.config.{module}.conf_dir", lambda: copy)
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
        ((": opt-30b}", ": opt-31b}"), "table.models.OPT-IML-30B = 'opt-31b'"),
        (('(author log)": total_min', '(log)": total_min'), "table.predict = 'HELM running time (log)'"),
        (("[model]", "[model, item]"), "rows, columns and grids = 'item'"),
        (("prompts: 64", "prompts: 0"), "table.assumed[0].num_prompts = 0"),
        (("prompts: 64", "prompts: -3"), "table.assumed[0].num_prompts = -3"),
        (("num_prompts: 64", "unrounded: -1.0"), "table.assumed[0].unrounded = -1"),
        (("prompts: 64", "prompts: 64, policy: bs=8x4; cpu atention"), "table.assumed[0].policy = 'cpu atention'"),
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
)
def test_a_table_that_cannot_be_is_explained_and_hides_no_other(
    tmp_path: Path,
    fake_systems: list[ConfiguredSystem],
    capsys: pytest.CaptureFixture[str],
    change: tuple[str, str],
    message: str,
) -> None:
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
    "table": "T2",
    "system": "FlexGen",
    "model": "OPT-30B",
    "prompt_len": "512",
    "gen_len": "32",
    "gpus": "1",
    "metric": "generation throughput",
    "value": "7.32",
    "unit": "token/s",
    "policy": "bs=48x3",
    "source": "V2 [exact]",
}


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
def test_a_broken_printed_row_is_named(tmp_path: Path, field: str, value: str, message: str) -> None:
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


def test_broken_records_are_named_and_hide_no_other(tmp_path: Path, fake_systems: list[ConfiguredSystem]) -> None:
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
