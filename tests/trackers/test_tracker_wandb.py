"""The tracker sends what happens and what the records say, and its troubles stay its own."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.metrics import GENERATION, metrics, summaries
from flexgen_bench.store.reader import StoredRecord
from flexgen_bench.store.writer import write_record
from flexgen_bench.trackers.base import TrackedResult, TrackedRun, Tracker
from flexgen_bench.trackers.cell_run import cell_result, cell_summary
from flexgen_bench.trackers.registry import make_tracker
from flexgen_bench.trackers.sender import Sender
from flexgen_bench.trackers.wandb_tracker import LOG
from tests.support.record_factory import make_record
from tests.trackers.conftest import PREDICTION, Tracked

RUN = TrackedRun("abc", "flexgen tiny", "s", "cell", ("MEASURED",), {"system": "flexgen"})
DONE = TrackedResult(ok=True, summary={"x": 1.0})


def without_empty(value: Any) -> Any:
    """Without empty mappings, which wandb keeps nowhere."""
    if not isinstance(value, dict):
        return value
    return {name: without_empty(inner) for name, inner in value.items() if inner != {}}


def test_a_cell_is_a_run_with_its_history(tracked: Tracked) -> None:
    cell, record = tracked.cell("flexgen"), tracked.records["flexgen"].record
    assert (cell.project, cell.group, cell.kind, cell.exit) == ("p", "pairs", "cell", 0)
    assert {"MEASURED", "flexgen", "nano", "cpu", "ok"} <= set(cell.tags)
    assert cell.config["spec"] == without_empty(json.loads(json.dumps(dict(record.spec))))
    assert cell.config["spec_hash"] == record.spec_hash
    assert cell.config["environment"]["cpu"] == record.environment["cpu"]
    live = cell.having("live/decode_tokens")
    assert [row["generation"] for row in live] == sorted(row["generation"] for row in live)
    assert {row["stage"] for row in live} == {"warmup", "measure"}
    last = live[-1]
    assert (last["queue/waiting"], last["queue/decode"], last["queue/done"]) == (0, 0, 4)
    assert last["pass"] == 3 * 2 * 6, "three generations of two blocks of six passes"
    assert last["memory/cpu_planned_bytes"] == record.report.planned_bytes["cpu"]
    sent = sum(row["link/disk_read_bytes"] for row in live if row["queue/done"] == 4)
    assert sent == pytest.approx(record.report.links["disk_read"].bytes, rel=0.2)
    assert 0 < last["lane/cpu_busy_share"] <= 1
    assert [row[f"metric/{GENERATION}"] for row in cell.having("repetition")] == pytest.approx(
        metrics(record)[GENERATION].samples
    )
    assert cell.steps["metric/*"] == "repetition"
    assert cell.steps["*"] == "time_s"


def test_a_system_that_knows_phases_alone_sends_what_it_knows(tracked: Tracked) -> None:
    live = tracked.cell("transformers").having("live/decode_tokens")
    assert live[-1]["live/decode_tokens"] == 4 * 5
    assert max(row["live/prefill_tok_per_s"] for row in live) > 0
    assert live[-1]["memory/process_resident_bytes"] > 2**20
    assert not [name for row in live for name in row if name.startswith(("queue/", "lane/", "link/"))]


def test_summary_tables_picture_and_files_are_those_of_the_record(tracked: Tracked) -> None:
    cell, stored = tracked.cell("flexgen"), tracked.records["flexgen"]
    assert cell_summary(stored).items() <= cell.summary.items()
    headline = summaries(stored.record)[GENERATION]
    assert cell.summary[GENERATION] == pytest.approx(headline.value)
    assert cell.summary[f"{GENERATION}_low"] == pytest.approx(headline.low)
    assert cell.summary["predicted_tok_per_s"] == PREDICTION["tok_per_s"]
    assert {row["what"]: row["value"] for row in cell.table("plan")}["policy.gpu_batch_size"] == "2"
    ids = [" ".join(map(str, row)) for row in stored.record.outputs["token_ids"]]
    assert [row["new_ids"] for row in cell.table("tokens")] == ids
    lanes = {row["lane"]: row for row in cell.table("lanes")}
    assert lanes["disk_read"]["bytes"] == stored.record.report.links["disk_read"].bytes
    (html,) = cell.having("lanes_picture")
    assert "<svg" in (cell.folder / "files" / html["lanes_picture"]["path"]).read_text()
    assert {"trace.json.gz", "lanes.svg", "perfetto.trace.json", stored.path.name} in [set(a) for a in cell.artifacts]


def test_resuming_a_suite_duplicates_nothing(tracked: Tracked) -> None:
    """The fixture has run it twice: cells are not sent again, and there is one table, of all of them."""
    assert len({run.id for run in tracked.runs}) == len(tracked.runs)
    assert len(tracked.of_kind("cell")) == 3
    (suite,) = tracked.of_kind("suite")
    assert {(row["system"], row["status"]) for row in suite.table("cells")} == {
        ("flexgen", "ok"),
        ("transformers", "ok"),
        ("missing", "unavailable"),
    }
    assert tracked.cell("missing").exit == 1
    assert "no_such_module_anywhere" in tracked.cell("missing").summary["reason"]


def test_accuracy_is_a_run_for_each_mode(tracked: Tracked) -> None:
    exact, w4 = sorted(tracked.of_kind("accuracy"), key=lambda run: run.config["mode"])
    assert (exact.config["mode"], w4.config["mode"]) == ("exact", "w4")
    (row,) = w4.table("accuracy")
    assert row["change"] == pytest.approx(row["score"] - row["exact_score"])
    assert row["low"] <= row["change"] <= row["high"]
    assert w4.summary["task/quiz"] == row["score"]
    assert w4.summary["bytes_per_weight"] > 0


def test_names_and_ids_are_stable(tmp_path: Path) -> None:
    """A killed measurement has left no record: the next one has its id. A rerun has its own."""
    from flexgen_bench.store.own_records import note_own
    from flexgen_bench.trackers.cell_run import cell_run

    def run(folder: Path) -> TrackedRun:
        record = make_record()
        known: dict[str, Any] = {"spec_hash": record.spec_hash, "evidence": "MEASURED", "results_dir": folder}
        return cell_run(record.spec, "s", {}, record.environment, **known)

    first, again = run(tmp_path / "a"), run(tmp_path / "a")
    assert (first.id, first.name) == (again.id, again.name)
    assert run(tmp_path / "b").id != first.id, "another results folder is another machine"
    record = make_record(suite="s")
    write_record(record, tmp_path / "a")
    assert run(tmp_path / "a").id == first.id, "measured elsewhere"
    note_own(tmp_path / "a", record.run_id)
    rerun = run(tmp_path / "a")
    assert rerun.id != first.id
    assert rerun.name == f"{first.name} #2"


def test_long_outputs_are_bounded() -> None:
    outputs = {"token_ids": [[7] * 5000] * 200, "texts": ["x" * 9000] * 200, "prompt_lengths": [8] * 200}
    result = cell_result(StoredRecord(Path("r.json"), replace(make_record(), outputs=outputs)))
    rows = result.tables["tokens"].rows
    assert len(rows) == 64
    assert max(len(str(value)) for row in rows for value in row) <= 4000


def _replace_wandb(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "wandb.py").write_text(source)
    paths = [str(folder), str(Path(__file__).parents[2])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def _tracker(tmp_path: Path, **options: Any) -> Tracker:
    tracker = make_tracker("wandb", options, tmp_path / "results")
    assert tracker is not None
    return tracker


def test_without_wandb_the_run_goes_on_and_says_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _replace_wandb(tmp_path / "fake", "raise ImportError('no such thing')", monkeypatch)
    tracker = _tracker(tmp_path)
    for _ in range(4):
        tracker.begin(RUN)
        tracker.log({"time_s": 1.0})
        tracker.end(DONE)
    tracker.close()
    said = capfd.readouterr().err
    assert said.count("\n") == 2, "once of the run, and once that no further one will be sent"
    assert said.count("and of what follows is lost") == 1
    assert "wandb cannot be imported (no such thing); pip install wandb" in said
    assert "flexgen tiny" in said
    assert "The records are safe on disk" in said


_FAKE = (
    "import os, pathlib\n"
    "class Settings:\n    def __init__(self, **_): pass\n"
    "class Config(dict):\n    def update(self, *_, **__): pass\n"
    "class Run:\n"
    "    summary, config, tags, id = {}, Config(), (), 'abc'\n"
    "    def __getattr__(self, name): return lambda *_, **__: None\n"
    "def init(mode, name, id, **_):\n"
    "    if mode == 'online': raise RuntimeError('no login')\n"
    "    pathlib.Path(os.environ['WANDB_DIR'], 'sent').write_text(f'{id} {name} {mode}')\n"
    "    return Run()\n"
)


def test_online_without_a_login_is_written_offline_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stand-in refuses as wandb does: asking the real one would need a network that may not be there."""
    _replace_wandb(tmp_path / "fake", _FAKE, monkeypatch)
    monkeypatch.delenv("WANDB_MODE")
    tracker = _tracker(tmp_path, mode="online")
    tracker.begin(RUN)
    tracker.end(DONE)
    tracker.close()
    assert "RuntimeError: no login; written offline instead" in capfd.readouterr().err
    assert (tmp_path / "wandb" / "sent").read_text() == "abc flexgen tiny offline"


def test_the_environment_can_keep_everything_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _replace_wandb(tmp_path / "fake", _FAKE, monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    old = tmp_path / "wandb" / "wandb" / "offline-run-20260101_000000-abc"
    old.mkdir(parents=True)
    tracker = _tracker(tmp_path, mode="online")
    tracker.begin(RUN)
    tracker.end(DONE)
    tracker.close()
    assert capfd.readouterr().err == ""
    assert (tmp_path / "wandb" / "sent").read_text().endswith("offline")
    assert not old.exists(), "what a killed run of this id has left is replaced"


def test_a_server_that_never_answers_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also its helper processes end: an orphan would disturb the next measurement."""
    mark = f"orphan-of-{os.getpid()}"
    hang = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', '{mark}'])\n"
        "time.sleep(600)\n"
    )
    _replace_wandb(tmp_path / "fake", hang, monkeypatch)
    tracker = _tracker(tmp_path, timeout_s=2.0)
    begun = time.monotonic()
    tracker.begin(RUN)
    assert time.monotonic() - begun < 30
    assert "no end after 2 s" in capfd.readouterr().err
    left = [
        p.pid
        for p in psutil.process_iter(["cmdline", "status"])
        if mark in (p.info["cmdline"] or ()) and p.info["status"] != psutil.STATUS_ZOMBIE
    ]
    assert left == []
    tracker.log({"time_s": 1.0})
    tracker.end(DONE)


def test_rows_that_nobody_takes_are_dropped_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement is running: the pipe of a sender that is busy fills up, and then nothing is stored for it."""
    (tmp_path / "sleeper.py").write_text(
        "import json, sys, time\ntime.sleep(1)\nrows = 0\nfor line in sys.stdin:\n"
        "    order = json.loads(line)\n    rows += 'row' in order\n"
        "    if 'end' in order:\n        print(json.dumps({'problem': str(rows)}), flush=True)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sender = Sender("sleeper", {}, tmp_path / LOG)
    try:
        taken = [sender.tell({"row": "x" * 1000}) for _ in range(1000)]
        assert 0 < sum(taken) < 1000
        assert sender.ask({"end": True}, 30.0) == str(sum(taken))
    finally:
        sender.end()
        sender.end()


def test_a_folder_that_cannot_be_made_is_told_and_no_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wandb").write_text("a file")
    tracker = _tracker(tmp_path)
    tracker.begin(RUN)
    tracker.end(DONE)
    assert capfd.readouterr().err.count("tracker wandb: ") == 1


def test_unknown_names_and_options_are_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one of none, wandb"):
        make_tracker("wanbd", {}, tmp_path)
    with pytest.raises(UserError, match="must be left out: tracker has entity, mode, project, timeout_s"):
        make_tracker("wandb", {"projekt": "x"}, tmp_path)
    with pytest.raises(UserError, match="one of offline, online"):
        make_tracker("wandb", {"mode": "cloud"}, tmp_path)
    with pytest.raises(UserError, match="without options"):
        make_tracker("none", {"mode": "offline"}, tmp_path)
    assert make_tracker("none", {}, tmp_path) is None
