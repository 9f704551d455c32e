"""The tracker sends what the records say, and its troubles stay its own."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flexgen_bench.core.errors import UserError
from flexgen_bench.core.metrics import GENERATION, metrics
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.store.writer import write_record
from flexgen_bench.trackers.registry import make_tracker
from flexgen_bench.trackers.wandb_sender import run_history
from tests.support.record_factory import make_record

_BLOCK, _HEAD = 32768, 7


def log_payloads(path: Path) -> Iterator[bytes]:
    """The messages of a LevelDB-style log: blocks of chunks, each (checksum, length, kind) and data."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, whole = _HEAD, b""
    while at + _HEAD <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEAD:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += _HEAD
        chunk, at = data[at : at + length], at + length
        whole = chunk if kind in (1, 2) else whole + chunk  # 1 whole, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            yield whole


def read_offline_run(folder: Path) -> dict[str, Any]:
    """Name, group, tags, configuration, history and summary of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record as Message

    def items(found: Any) -> dict[str, Any]:
        return {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in found}

    run: dict[str, Any] = {"config": {}, "history": [], "summary": {}}
    (log,) = folder.glob("*.wandb")
    for payload in log_payloads(log):
        message = Message()
        message.ParseFromString(payload)
        kind = message.WhichOneof("record_type")
        if kind == "run":
            run |= {"name": message.run.display_name, "group": message.run.run_group}
            run |= {"tags": list(message.run.tags), "project": message.run.project}
            run["config"] |= items(message.run.config.update)
        elif kind == "config":
            run["config"] |= items(message.config.update)
        elif kind == "history":
            run["history"].append(items(message.history.item))
        elif kind == "summary":
            run["summary"] |= items(message.summary.update)
        elif kind == "exit":
            run["exit"] = message.exit.exit_code
    return run


def test_an_offline_run_reads_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    record = make_record(times=[(1.0, 2.0), (1.5, 2.5)], evidence=Evidence.EMULATED)
    tracker = make_tracker("wandb", {"mode": "offline", "project": "p"}, tmp_path / "wandb-files")
    tracker.log_record(record, write_record(record, tmp_path / "results"))
    failed = make_record("other", samples=(), status=Status.OOM, reason="cap")
    path = write_record(failed, tmp_path / "results")
    tracker._suites["default"].append(path)  # type: ignore[attr-defined]  # saves one start of wandb
    tracker.finish()

    assert capfd.readouterr().err == ""
    assert list(home.rglob("*")) == []
    runs = {}
    for folder in (tmp_path / "wandb-files" / "wandb").glob("offline-run-*"):
        run = read_offline_run(folder)
        runs[run["name"]] = run | {"folder": folder}
    cell, table = runs["flexgen tiny 8-4"], runs["table default"]

    assert (cell["project"], cell["group"], cell["exit"]) == ("p", "default", 0)
    assert set(cell["tags"]) == {"ok", "EMULATED", "flexgen"}
    assert cell["config"]["spec"] == json.loads(json.dumps(dict(record.spec)))
    assert cell["config"]["spec_hash"] == record.spec_hash
    assert cell["config"]["environment"]["cpu"] == {"model": "Some CPU", "usable_cores": 2}
    assert len(cell["history"]) == len(record.samples)
    for sent, expected in zip(cell["history"], run_history(record), strict=True):
        assert expected.items() <= sent.items()
    rates = [row[f"metric/{GENERATION}"] for row in cell["history"]]
    assert rates == pytest.approx(metrics(record)[GENERATION].samples)
    headline = cell["summary"][f"metric/{GENERATION}"]
    assert headline["value"] == pytest.approx(32 / 7)
    assert (headline["evidence"], headline["unit"], headline["n"]) == ("EMULATED", "tok/s", 2)

    (media,) = (table["folder"] / "files" / "media" / "table").glob("*.json")
    content = json.loads(media.read_text())
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
    assert {(r["system"], r["status"], r["evidence"]) for r in rows} == {
        ("flexgen", "ok", "EMULATED"),
        ("other", "oom", "MEASURED"),
    }


def _replace_wandb(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "wandb.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_without_wandb_the_run_goes_on_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _replace_wandb(tmp_path / "fake", "raise ImportError('no such thing')", monkeypatch)
    tracker = make_tracker("wandb", {}, tmp_path / "wandb")
    record = make_record()
    path = write_record(record, tmp_path)
    tracker.log_record(record, path)
    tracker.finish()
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "wandb cannot be imported (no such thing); pip install wandb" in said
    assert "The records are safe on disk" in said


def test_online_without_a_login_is_written_offline_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stand-in refuses as wandb does: asking the real one would need a network that may not be there."""
    fake = (
        "import json, os, pathlib\n"
        "class Settings:\n    def __init__(self, **_): pass\n"
        "class Run:\n"
        "    summary = {}\n"
        "    def __getattr__(self, name): return lambda *_, **__: None\n"
        "def init(mode, name, **_):\n"
        "    if mode == 'online': raise RuntimeError('no login')\n"
        "    pathlib.Path(os.environ['WANDB_DIR'], 'sent').write_text(name)\n"
        "    return Run()\n"
    )
    _replace_wandb(tmp_path / "fake", fake, monkeypatch)
    tracker = make_tracker("wandb", {"mode": "online"}, tmp_path / "wandb")
    record = make_record()
    tracker.log_record(record, write_record(record, tmp_path))
    assert "RuntimeError: no login; written offline instead" in capfd.readouterr().err
    assert (tmp_path / "wandb" / "sent").read_text() == "flexgen tiny 8-4"


def test_a_server_that_never_answers_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also its helper processes end: an orphan would disturb the next measurement."""
    hang = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[0]])\n"
        "time.sleep(600)\n"
    )
    _replace_wandb(tmp_path / "fake", hang, monkeypatch)
    tracker = make_tracker("wandb", {"timeout_s": 2.0}, tmp_path / "wandb")
    record = make_record()
    begun = time.monotonic()
    tracker.log_record(record, write_record(record, tmp_path))
    assert time.monotonic() - begun < 30
    assert "no end after 2 s" in capfd.readouterr().err
    left = [
        p.pid
        for p in psutil.process_iter(["cmdline", "status"])
        if any("wandb_sender.py" in part for part in p.info["cmdline"] or ())
        and p.info["status"] != psutil.STATUS_ZOMBIE
        and p.pid != os.getpid()
    ]
    assert left == []


def test_a_folder_that_cannot_be_made_is_told_and_no_more(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wandb").write_text("a file")
    tracker = make_tracker("wandb", {}, tmp_path / "wandb")
    record = make_record()
    tracker.log_record(record, write_record(record, tmp_path))
    assert "tracker wandb: " in capfd.readouterr().err


def test_unknown_names_and_options_are_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one of none, wandb"):
        make_tracker("wanbd", {}, tmp_path)
    with pytest.raises(UserError, match="must be left out: tracker has entity, mode, project, timeout_s"):
        make_tracker("wandb", {"projekt": "x"}, tmp_path)
    with pytest.raises(UserError, match="one of offline, online"):
        make_tracker("wandb", {"mode": "cloud"}, tmp_path)
    with pytest.raises(UserError, match="without options"):
        make_tracker("none", {"mode": "offline"}, tmp_path)
    make_tracker("none", {}, tmp_path).finish()
