"""What the page is made of: every record, every file that is none, and data that stays data."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.metrics import summarise
from flexgen_bench.page.build import ASSETS, CELLS_A_FILE, PageBuilder
from flexgen_bench.page.gather import Gatherer
from flexgen_bench.page.lanes import picture
from flexgen_bench.page.scripts import script
from flexgen_bench.store.whole_file import write_text
from flexgen_bench.store.writer import write_record
from tests.support.page_records import HOSTILE, break_files, write_results
from tests.support.record_factory import make_record

CALL = re.compile(r"page\.data\((\"[^\"]*\"),'(.*)'\);\n", re.DOTALL)


def build(results: Path, out: Path, *more: Path) -> Path:
    return PageBuilder(Gatherer([results, *more]), out, lambda _: None, tables=()).build().parent


def data(page: Path, name: str) -> Any:
    """What a browser reads from a data file."""
    found = CALL.fullmatch((page / "data" / f"{name}.js").read_text(encoding="ascii"))
    assert found is not None
    assert json.loads(found[1]) == name
    return json.loads(re.sub(r"\\(.)", r"\1", found[2]))


def column(page: Path, name: str) -> list[Any]:
    values = data(page, "rows")["columns"][name]
    return list(values["numbers"]) if "numbers" in values else [values["values"][at] for at in values["at"]]


def cells(page: Path) -> list[dict[str, Any]]:
    return list(data(page, "cells-0")["cells"])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_results(tmp_path / "results")
    return tmp_path / "results"


def test_every_record_is_a_row_with_the_figures_of_the_tables(results: Path, tmp_path: Path) -> None:
    page = build(results, tmp_path / "page")
    assert sorted(column(page, "id")) == [f"run{n}" for n in range(1, 8)]
    at = column(page, "id").index("run2")
    summary = summarise(make_record())
    assert summary is not None
    assert column(page, "tok")[at] == pytest.approx(summary.value, rel=1e-5)
    assert (column(page, "low")[at], column(page, "high")[at]) == pytest.approx((summary.low, summary.high), rel=1e-5)
    assert column(page, "policy")[at] == "4x1; weights cpu 25 %, disk 75 %; KV cache cpu; hidden cpu"
    # 4 prompts in batches of 2, 16 s in 3 repetitions.
    assert column(page, "latency")[at] == pytest.approx(16 / 6, rel=1e-5)
    assert dict(zip(column(page, "id"), column(page, "run"), strict=True))["run1"] == "older"
    assert set(column(page, "compression")) == {"exact", "4-bit weights"}
    assert {"MEASURED", "EMULATED"} == set(column(page, "evidence"))


def test_a_cell_answers_which_policy_how_sure_and_why(results: Path, tmp_path: Path) -> None:
    page = build(results, tmp_path / "page")
    cell = next(c for c in cells(page) if c["run_id"] == "run2")
    assert cell["policy"].startswith("4x1; weights cpu 25 %")
    assert "search" in cell["chosen_by"]
    assert any("cpu 81%" in line and "MEASURED" in line for line in cell["why"])  # 0.96 of 1.18 s, by its trace
    assert any("cpu: busy 90% of the job (SIMULATED)" in line for line in cell["why"])
    assert cell["metrics"][0]["samples"] == pytest.approx([4.0, 16 / 6, 16 / 6])
    assert cell["realised"] == {"weights": {"cpu": 0.2, "disk": 0.8}}
    assert {"tier": "cpu", "purpose": "kv_cache", "bytes": 20} in cell["purposes"]
    assert cell["memory"][0] == {
        "tier": "cpu",
        "planned": 2**30,
        "peak": 3 * 2**29,
        "anonymous": 2**30,
        "limit": 2**31,
        "enforced": True,
    }
    assert cell["rerun"] == "python -m flexgen_bench system=flexgen"
    failed = next(c for c in cells(page) if c["run_id"] == "run4")
    assert failed["why"] == ["keeps all weights in memory"]


def test_busy_shares_are_told_only_of_the_time_they_belong_to(tmp_path: Path) -> None:
    """Lanes count since the weights were loaded: where batch sizes were tried since, that time is in no sample."""
    from flexgen_bench.core.record import SystemReport, TuningProbe
    from flexgen_bench.page.policy_words import busy_shares

    report = SystemReport(lane_busy_s={"cpu": 8.0})
    assert busy_shares(make_record(report=report)) == {"cpu": pytest.approx(0.5)}
    assert busy_shares(make_record(report=report, tuning=(TuningProbe(2, 1.0),))) == {}
    assert busy_shares(make_record(report=SystemReport(lane_busy_s={"cpu": 30.0}))) == {}


def test_broken_files_are_named_and_hide_nothing(results: Path, tmp_path: Path) -> None:
    break_files(results, how_many=60)
    page = build(results, tmp_path / "page")
    assert len(column(page, "id")) == 7
    assert data(page, "rows")["broken"] == 240
    broken = data(page, "broken")
    messages = {one["file"].rsplit("/", 1)[-1]: one["message"] for one in broken}
    assert "not a whole JSON document" in messages["cut-0.json"]
    assert "schema version 99" in messages["later-0.json"]
    assert "not a record" in messages["other-0.json"]
    assert "cannot read" in messages["bytes-0.json"]
    assert not any(one["message"].startswith(one["file"]) for one in broken)


def test_odd_records_hide_nothing(results: Path, tmp_path: Path) -> None:
    """Their free parts may hold anything: one whose spec is of no cell once ended the page."""
    whole = make_record()
    odd: list[dict[str, Any]] = [
        {"spec": {}},
        {"spec": {**whole.spec, "lossy": "much"}},
        {"spec": {**whole.spec, "model": "opt", "workload": ["x"], "hardware": 3}},
        {"report": replace(whole.report, requested={"weights": {"cpu": "all"}, "gpu_batch_size": []})},
        {"prediction": {"tok_per_s": "fast", "policy": 7}, "environment": {"cpu": "x", "code": "y", "gpus": 4}},
        {"outputs": {"texts": 5, "prompts": {"a": 1}}, "validity": {"x": False}, "memory_cap": {"peak_bytes": "z"}},
    ]
    for number, changes in enumerate(odd):
        write_record(replace(make_record(run=number), **changes, suite="odd"), results)
    infinite = json.loads(next((results / "odd").iterdir()).read_text(encoding="utf-8")) | {"spec_hash": "infinite"}
    text = json.dumps(infinite).replace('"realised": {}', '"realised": {"weights": 1e999}')
    (results / "odd" / "infinite.json").write_text(text, encoding="utf-8")
    page = build(results, tmp_path / "page")
    shown, broken = column(page, "suite"), data(page, "broken")
    assert shown.count("default") == 7
    assert shown.count("odd") + len({b["file"] for b in broken}) >= len(odd) + 1
    assert any("UserError" in b["message"] for b in broken)


def test_a_folder_of_broken_files_alone_is_a_page(tmp_path: Path) -> None:
    results = tmp_path / "results"
    write_record(make_record(), results)
    break_files(results)
    next(p for p in (results / "default").glob("flexgen*.json")).unlink()
    page = build(results, tmp_path / "page")
    assert column(page, "id") == []
    assert len(data(page, "broken")) == 4


def test_text_in_records_stays_data(results: Path, tmp_path: Path) -> None:
    page = build(results, tmp_path / "page")
    for path in (page / "data").glob("*.js"):
        text = path.read_text(encoding="ascii")  # no line separators, no lone surrogates
        assert CALL.fullmatch(text), path
    assert HOSTILE in column(page, "model")
    assert next(c for c in cells(page) if c["run_id"] == "run7")["rerun"] == HOSTILE
    assert all(
        not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", p.read_text())
        for p in ASSETS.glob("*.js")
    )


@pytest.mark.parametrize("text", ["'", "\\", "\\'", "\u2028", "\ud800", "</script>", "\n", "é", 'a"b'])
def test_a_script_hands_over_what_it_was_given(text: str) -> None:
    found = CALL.fullmatch(script("x", {"text": text}))
    assert found is not None
    assert json.loads(re.sub(r"\\(.)", r"\1", found[2])) == {"text": text}


def test_nothing_is_read_from_elsewhere(results: Path, tmp_path: Path) -> None:
    page = build(results, tmp_path / "page")
    index = (page / "index.html").read_text(encoding="utf-8")
    named = re.findall(r'(?:src|href)="([^"]+)"', index)
    assert all((page / name).is_file() for name in named if not name.startswith(("#", "data:")))
    own = [p for p in page.glob("*") if p.suffix in (".html", ".css", ".js")]
    assert not any(re.search(r"https?://", p.read_text(encoding="utf-8")) for p in own)
    assert (page / "vendor" / "chart.LICENSE.md").is_file()
    for path in own:
        assert path.read_text(encoding="utf-8").count("\n") < 300, "one idea a file"


def test_the_same_records_make_the_same_page(results: Path, tmp_path: Path) -> None:
    first, second = build(results, tmp_path / "a"), build(results, tmp_path / "b")
    for path in sorted(first.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


def test_a_new_page_leaves_no_cells_of_the_old_one(tmp_path: Path) -> None:
    results = tmp_path / "results"
    for run in range(CELLS_A_FILE + 1):
        write_record(make_record(f"system{run}"), results)
    page = build(results, tmp_path / "page")
    assert (page / "data" / "cells-1.js").is_file()
    (page / "mine.txt").write_text("kept")
    next(iter(sorted((results / "default").glob("*.json")))).unlink()
    build(results, page)
    assert not (page / "data" / "cells-1.js").exists()
    assert (page / "mine.txt").is_file()


def test_a_record_in_two_folders_is_two_rows(results: Path, tmp_path: Path) -> None:
    write_record(make_record("flexgen", run=2), tmp_path / "more")
    page = build(results, tmp_path / "page", tmp_path / "more")
    assert {"run2", "run2~2"} <= set(column(page, "id"))
    assert len(set(column(page, "folder"))) == 2


def test_lanes_hold_exact_steps_or_shares_of_the_time(results: Path, tmp_path: Path) -> None:
    page = build(results, tmp_path / "page")
    place = column(page, "id").index("run2")
    lanes = data(page, f"lanes-{place}")
    assert [p["name"] for p in lanes["panels"]] == ["Whole repetition", "Prefill: pass 1 of 3", "Decode: pass 3 of 3"]
    whole = lanes["panels"][0]
    assert whole["exact"]
    assert sum(step[2] for step in whole["lanes"]["cpu"]) == pytest.approx(12 * 0.08)
    assert "cpu was idle" in lanes["waiting"]


def test_many_steps_become_shares_that_keep_their_sum() -> None:
    from flexgen_bench.core.timeline import ROW, LaneTimeline, Timeline

    packed = b"".join(ROW.pack(0, 1 + n % 3, 0, -1, 0, n * 0.01, n * 0.01 + 0.004, 0, 0) for n in range(5000))
    lanes = picture(Timeline({"cpu": LaneTimeline(packed, ("layer",))}))
    panel = lanes["panels"][0]
    assert not panel["exact"]
    assert sum(share for _, _, share in panel["lanes"]["cpu"]) / 300 == pytest.approx(0.4, rel=0.01)


def test_a_trace_that_is_gone_is_told_where_it_would_be(results: Path, tmp_path: Path) -> None:
    for path in (results / "default" / "traces").iterdir():
        path.unlink()
    page = build(results, tmp_path / "page")
    place = column(page, "id").index("run2")
    assert "there is no trace" in data(page, f"lanes-{place}")["problem"]


def test_pictures_have_a_point_for_every_run_that_can(results: Path, tmp_path: Path) -> None:
    page = build(results, tmp_path / "page")
    found = data(page, "pictures")
    names = [p["name"] for p in found["pictures"]]
    assert {"throughput-latency", "predicted-measured"} <= set(names)
    assert set(found["missing"]) >= {"memory", "price", "accuracy-speed"}
    predicted = next(p for p in found["pictures"] if p["name"] == "predicted-measured")["panels"][0]
    point = predicted["series"][0]["points"][0]
    assert point[0] == column(page, "id").index("run2")
    assert point[1:3] == [48 / 16, 3.9]
    assert all(x == y for x, y in predicted["guides"][0]["points"])


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="results_dir"):
        Gatherer([tmp_path / "nowhere"])
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        write_text(tmp_path / "file" / "x.js", "")
