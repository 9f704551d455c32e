"""Every panel queries what runs have, and is the same where it is made and where it is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flexgen_bench.cli.dashboard import main
from flexgen_bench.config.paths import conf_dir
from flexgen_bench.core.errors import UserError
from flexgen_bench.trackers.dashboard import FILE, Dashboard, FieldRef, PanelKind, Scope, load_dashboard, missing_fields
from flexgen_bench.trackers.dashboard_text import instructions
from flexgen_bench.trackers.wandb_dashboard import report, workspace
from tests.support.wandb_runs import fields_of
from tests.trackers.conftest import Tracked


def test_every_panel_finds_its_fields_in_real_runs(tracked: Tracked) -> None:
    dashboard = load_dashboard()
    assert {section.runs for section in dashboard.sections} == {"cell", "suite", "accuracy"}
    assert missing_fields(dashboard, fields_of(tracked.runs)) == []


def test_a_field_that_is_renamed_is_missed_by_every_panel_that_queries_it(tracked: Tracked) -> None:
    """Field by field: whatever a panel queries, it is told by the panel's name when runs have it no more."""
    dashboard = load_dashboard()
    for section in dashboard.sections:
        for panel in section.panels:
            for one in panel.fields:
                if one.scope is Scope.RUN:
                    continue
                found = fields_of(tracked.runs)
                names = found[section.runs][one.scope]
                for name in one.among(names):
                    names.remove(name)
                    names.add(f"renamed {name}")
                problems = missing_fields(dashboard, found)
                assert f"{section.name}: {panel.name}: no {section.runs} run has {one}" in problems


def _edited(tmp_path: Path, old: str, new: str) -> Path:
    text = (conf_dir() / FILE).read_text()
    assert old in text
    path = tmp_path / FILE
    path.write_text(text.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("kind: scatter", "kind: pie", "one of bar, line, media, scatter, table"),
        ("x: summary.block_latency_s", "x: block_latency_s", "summary.NAME"),
        ("x: summary.block_latency_s", "x: history.time_s", "a field of summary or config"),
        ("kind: table, y", "kind: table, x: summary.a, y", "left out"),
        ("[summary.plan]", "['summary.pl*']", "without a star"),
        ("group: config.system", "group: summary.system", "a field of config or run"),
        ("runs: suite", "runs: sweep", "one of accuracy, cell, suite"),
        ("report: true", "raport: true", "raport"),
    ],
)
def test_a_definition_that_cannot_be_is_refused_by_name(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        load_dashboard(_edited(tmp_path, old, new))


def _panels(dashboard: Dashboard, kind: PanelKind) -> int:
    return sum(panel.kind is kind for section in dashboard.sections for panel in section.panels)


def test_the_view_and_the_report_are_made_without_a_login() -> None:
    pytest.importorskip("wandb_workspaces")
    dashboard = load_dashboard()
    view = workspace(dashboard, "somebody", "p")
    assert [section.name for section in view.sections] == [section.name for section in dashboard.sections]
    made = [panel for section in view.sections for panel in section.panels]
    names = [type(panel).__name__ for panel in made]
    assert names.count("ScatterPlot") == _panels(dashboard, PanelKind.SCATTER)
    assert names.count("LinePlot") == _panels(dashboard, PanelKind.LINE)
    sent = view._to_model().model_dump_json(by_alias=True)
    page = report(dashboard, "somebody", "p")._to_model().model_dump_json(by_alias=True, exclude_none=True)
    for section in dashboard.sections:
        for panel in section.panels:
            for one in panel.fields:
                name = one.regex.replace("\\", "\\\\") if one.is_pattern else one.name
                assert name in sent, panel.name
                assert not section.report or name in page, panel.name
    assert "jobType" in page, "each grid shows runs of its kind alone"


def test_without_a_login_every_panel_is_told_with_its_query(capsys: pytest.CaptureFixture[str]) -> None:
    """From the same definition: the words hold each panel's name and each field that it queries."""
    assert main(["--project", "mine"]) == 0
    said = capsys.readouterr()
    dashboard = load_dashboard()
    assert said.out == instructions(dashboard, "mine")
    assert said.err.startswith("not saved: ")
    for section in dashboard.sections:
        for panel in section.panels:
            _, _, rest = said.out.partition(f"Section: {section.name}\n")[2].partition(f": {panel.name}\n")
            own = re.split(r"\n  \S", rest)[0]
            for one in panel.fields:
                assert (one.regex if one.is_pattern else one.name) in own, panel.name


def test_a_login_is_looked_for_without_asking_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert main([]) == 0
    assert "there is no login here (wandb login)" in capsys.readouterr().err
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123")
    monkeypatch.setattr("flexgen_bench.cli.dashboard._save", lambda *_: ["view: there"])
    assert main([]) == 0
    assert capsys.readouterr().out == "view: there\n"

    def refused(*_: object) -> list[str]:
        raise ConnectionError("no server")

    monkeypatch.setattr("flexgen_bench.cli.dashboard._save", refused)
    assert main([]) == 1
    said = capsys.readouterr()
    assert "no server" in said.err
    assert "Section: " in said.out


def test_a_bad_definition_ends_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--panels", str(_edited(tmp_path, "kind: bar", "kind: cake"))]) == 2
    assert "one of bar, line, media, scatter, table" in capsys.readouterr().err


def test_a_star_stands_for_any_text() -> None:
    one = FieldRef.parse("history.lane/*_busy_share", "y")
    names = ["lane/cpu_busy_share", "lane/disk_read_busy_share", "lane/cpu_busy_s", "plane/cpu_busy_share"]
    assert one.among(names) == names[:2]
    assert [name for name in names if re.search(one.regex, name)] == names[:2]
