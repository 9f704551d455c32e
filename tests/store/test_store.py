"""Records survive being written and read, whole or not at all, and one bad file hides no other."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from datetime import UTC
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_bench.core.errors import StoreError
from flexgen_bench.core.record import SCHEMA_VERSION, LinkUse, Record, Sample, SystemReport, TuningProbe
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.store import schema
from flexgen_bench.store.reader import find_record, read_all, read_record
from flexgen_bench.store.schema import LEAST, MOST, decode, encode
from flexgen_bench.store.writer import to_bytes, write_record
from tests.support.record_factory import make_record, make_samples

# As large and as small as a figure may be.
finite = st.floats(-MOST / 2, MOST / 2).map(lambda value: value if abs(value) > 2 * LEAST else 0.0)
count = st.integers(0, 2**60)
amount = finite.map(abs)
name = st.text(max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | finite | name,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(name, inner, max_size=3),
    max_leaves=8,
)
free = st.dictionaries(name, json_values, max_size=3)
samples = st.lists(st.builds(Sample, amount, amount, count, count, count), max_size=3).map(tuple)
times = st.datetimes(timezones=st.just(UTC)).map(lambda t: t.isoformat())
records = st.builds(
    Record,
    run_id=name,
    spec_hash=name,
    spec=free,
    suite=name,
    status=st.sampled_from(Status),
    reason=st.text(),
    started_utc=times,
    ended_utc=times,
    rerun_command=name,
    evidence=st.sampled_from(Evidence),
    batch_size=st.none() | count,
    load_s=st.none() | amount,
    samples=samples,
    warmup_samples=samples,
    tuning=st.lists(st.builds(TuningProbe, count, st.none() | amount, name), max_size=2).map(tuple),
    report=st.builds(
        SystemReport,
        requested=free,
        realised=free,
        planned_bytes=st.dictionaries(name, count, max_size=2),
        peak_bytes=st.dictionaries(name, count, max_size=2),
        links=st.dictionaries(name, st.builds(LinkUse, count, amount), max_size=2),
        lane_busy_s=st.dictionaries(name, amount, max_size=2),
        lowest_tier=name,
        notes=st.lists(name, max_size=2).map(tuple),
    ),
    memory_cap=free,
    outputs=free,
    validity=free,
    environment=free,
)


@settings(max_examples=60, deadline=None)
@given(records)
def test_any_record_reads_back_equal(record: Record) -> None:
    content = to_bytes(record)
    again = decode(json.loads(content))
    assert again == record
    assert to_bytes(again) == content


def test_a_written_record_reads_back_and_leaves_nothing_else(tmp_path: Path) -> None:
    record = make_record()
    path = write_record(record, tmp_path)
    assert path == (tmp_path / "default" / f"flexgen--tiny--8-4--{record.spec_hash}--{record.run_id}.json")
    assert read_record(path).samples == record.samples
    assert os.listdir(path.parent) == [path.name]
    text = path.read_text()
    assert text.endswith("}\n")
    assert '\n "run_id"' in text


def test_a_record_is_never_overwritten(tmp_path: Path) -> None:
    path = write_record(make_record(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="never overwritten"):
        write_record(make_record(reason="another"), tmp_path)
    assert path.read_bytes() == before
    assert len(os.listdir(path.parent)) == 1


def test_no_name_in_a_record_leaves_the_results_folder(tmp_path: Path) -> None:
    spec = make_record().spec | {"system": "../../evil--name"}
    path = write_record(make_record(spec=None, suite="../up/..", **{"run_id": ".hidden"}), tmp_path)
    assert path.resolve().is_relative_to(tmp_path.resolve())
    path = write_record(replace(make_record(run=1), spec=spec, suite=""), tmp_path)
    assert path.parent == tmp_path / "single"
    assert path.name.count("--") == 4


def test_output_of_a_child_that_is_no_text_can_be_kept(tmp_path: Path) -> None:
    reason = b"killed \xff\xfe".decode(errors="surrogateescape")
    path = write_record(make_record(status=Status.FAILED, reason=reason), tmp_path)
    assert read_record(path).reason == reason


def test_a_number_that_is_not_finite_is_null_or_an_error(tmp_path: Path) -> None:
    nan = float("nan")
    unknown = make_record(load_s=nan, environment={"load": [float("inf"), 1.0]})
    back = read_record(write_record(unknown, tmp_path))
    assert back.load_s is None
    assert back.environment == {"load": [None, 1.0]}
    with pytest.raises(StoreError, match=r"record\.samples\[0\]\.decode_s = nan: must be a finite number"):
        write_record(make_record(samples=make_samples([(1.0, nan)])), tmp_path)


def test_what_json_cannot_carry_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"record\.environment\.where = PosixPath\('x'\): must be"):
        write_record(make_record(environment={"where": Path("x")}), tmp_path)
    with pytest.raises(StoreError, match=r"record\.started_utc is 'today'"):
        write_record(make_record(started_utc="today"), tmp_path)
    assert list(tmp_path.rglob("*")) == []


def test_a_results_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(StoreError, match=r"cannot save record .*results.*: (Not a directory|File exists)"):
        write_record(make_record(), tmp_path / "results")


def test_disk_full_leaves_no_half_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flexgen_bench.store.writer.os.fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        write_record(make_record(), tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_kill_at_any_moment_leaves_whole_records(tmp_path: Path) -> None:
    program = (
        "import sys, itertools; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from tests.support.record_factory import make_record; from flexgen_bench.store.writer import write_record\n"
        "for i in itertools.count():\n"
        "    write_record(make_record(run_id=f'r{i}'), Path(sys.argv[1])); print(i, flush=True)\n"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parents[2])]
    writer = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    for _ in range(30):
        writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    files = list((tmp_path / "default").glob("*.json"))
    assert len(files) >= 30
    for path in files:
        read_record(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("suite"), r"record\.suite = None: must be given"),
        (lambda d: d.update(extra=1), r"record\.extra = 1: must be left out"),
        (lambda d: d.update(schema_version=SCHEMA_VERSION + 1), "Update flexgen-bench"),
        (lambda d: d.update(schema_version=0), "nothing here upgrades version 0"),
        (lambda d: d.pop("schema_version"), "no integer field schema_version"),
        (lambda d: d.update(status="great"), r"record\.status = 'great': must be one of failed, invalid, ok, oom"),
        (lambda d: d["samples"][0].update(prefill_s="1"), r"samples\[0\]\.prefill_s = '1': must be a number"),
        (lambda d: d["samples"][0].pop("decode_s"), r"samples\[0\]\.decode_s = None: must be given"),
        (lambda d: d.update(batch_size=True), "record.batch_size = True: must be an integer"),
        (lambda d: d.update(ended_utc="soon"), "not a time"),
        # Seconds below zero once gave a throughput beyond all others, marked MEASURED.
        (
            lambda d: d["samples"][0].update(prefill_s=-1.0),
            r"record\.samples\[0\]\.prefill_s must be at least 0, but is -1\.0",
        ),
        (lambda d: d["samples"][1].update(generated_tokens=-4), r"samples\[1\]\.generated_tokens"),
        (lambda d: d.update(batch_size=-1), "record.batch_size must be at least 0, but is -1"),
        (lambda d: d.update(load_s=-0.5), "record.load_s must be at least 0"),
        (lambda d: d["report"]["links"]["disk_read"].update(bytes=-1), "links.disk_read.bytes"),
        (lambda d: d["report"]["peak_bytes"].update(cpu=-1), "report.peak_bytes.cpu"),
    ],
)
def test_a_wrong_record_is_refused_by_file_and_field(tmp_path: Path, change: Any, message: str) -> None:
    data = encode(make_record())
    change(data)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(data))
    with pytest.raises(StoreError, match=message) as caught:
        read_record(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"NaN", b'{"schema_version": NaN}'])
def test_what_is_no_record_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(StoreError, match=re.escape(str(path))):
        read_record(path)


def test_older_versions_are_upgraded_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    old = encode(make_record()) | {"schema_version": SCHEMA_VERSION - 2}
    old["why"] = old.pop("reason")

    def rename(data: dict[str, Any]) -> dict[str, Any]:
        return {"reason" if k == "cause" else k: v for k, v in data.items()}

    def first(data: dict[str, Any]) -> dict[str, Any]:
        return {"cause" if k == "why" else k: v for k, v in data.items()}

    monkeypatch.setattr(schema, "UPGRADES", {SCHEMA_VERSION - 2: first, SCHEMA_VERSION - 1: rename})
    assert decode(old) == decode(encode(make_record()))


def test_read_all_takes_the_newest_and_lists_the_damaged(tmp_path: Path) -> None:
    write_record(make_record(run=1, reason="old"), tmp_path)
    newest = write_record(make_record(run=2, reason="new"), tmp_path)
    other = write_record(make_record("accelerate"), tmp_path)
    elsewhere = write_record(make_record(suite="disk"), tmp_path)
    other_machine = write_record(make_record(run=0, environment={"cpu": {"model": "Another"}}), tmp_path)
    damaged = tmp_path / "default" / "x--y--z--0--1.json"
    damaged.write_text('{"half": ')
    impossible = encode(make_record("accelerate", run=3))
    impossible["samples"][0]["prefill_s"] = -1.0
    backwards = tmp_path / "default" / "y--y--z--0--1.json"
    backwards.write_text(json.dumps(impossible))
    (tmp_path / "default" / ".x.json.123.tmp").write_text("{")
    found, problems = read_all(tmp_path)
    assert {s.path for s in found} == {newest, other, elsewhere, other_machine}
    assert [p.path for p in problems] == [damaged, backwards]
    assert str(damaged) in problems[0].message
    assert "samples[0].prefill_s" in problems[1].message
    assert read_all(tmp_path / "absent") == ([], [])


def test_find_record_ignores_what_is_not_whole(tmp_path: Path) -> None:
    record = make_record(run=1)
    assert find_record(tmp_path, record.spec_hash) is None
    path = write_record(record, tmp_path)
    later = path.with_name(path.name.replace("run1", "run2"))
    later.write_bytes(path.read_bytes()[:-20])
    assert find_record(tmp_path, record.spec_hash) == path
    assert find_record(tmp_path, record.spec_hash, suite="default") == path
    assert find_record(tmp_path, record.spec_hash, suite="disk") is None
    assert find_record(tmp_path, "f" * 16) is None


def _dataclasses_of(kind: Any) -> set[type]:
    found = {kind} if is_dataclass(kind) and isinstance(kind, type) else set()
    inner = get_type_hints(kind).values() if found else get_args(kind)
    return found.union(*(_dataclasses_of(hint) for hint in inner)) if inner else found


def test_every_field_is_described() -> None:
    """The schema page must not fall behind the code."""
    page = (Path(__file__).parents[2] / "docs" / "record.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))
    kinds = _dataclasses_of(Record)
    assert {k.__name__ for k in kinds} >= {"Record", "Sample", "SystemReport", "LinkUse"}
    for kind in kinds:
        described = re.findall(r"^\| `(\w+)` \|", sections[kind.__name__], re.MULTILINE)
        assert described == [f.name for f in fields(kind)], kind.__name__
    assert f"`schema_version` is {SCHEMA_VERSION}." in page
