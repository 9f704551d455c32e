"""Traces: what a real run leaves, the files made of it, the figures, and what is wrong with what is not a trace."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_bench.cli.trace import main, write_files
from flexgen_bench.core.errors import StoreError, UserError
from flexgen_bench.core.record import Record
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.core.timeline import ROW, LaneTimeline, Slice, Timeline
from flexgen_bench.schedule.steps import StepKind
from flexgen_bench.store.reader import read_all, read_record
from flexgen_bench.store.trace import Trace, encode_trace, read_trace, write_trace
from flexgen_bench.store.writer import write_record
from flexgen_bench.trace.axis import ticks
from flexgen_bench.trace.chart import COLOURS, MOST_BOXES, chart
from flexgen_bench.trace.chrome import trace_events
from flexgen_bench.trace.passes import find_passes, typical
from flexgen_bench.trace.runs import TracedRun, find_run
from flexgen_bench.trace.summary import gaps, overlap, summarise, to_text
from tests.support.record_factory import make_record

KINDS = tuple(str(kind) for kind in StepKind)
OVERRIDES = (
    "suite=tiny",
    "system=flexgen",
    "gpu=emulated",
    "measure.repetitions=1",
    "measure.warmup=0",
    "policy=weights-cpu",
    "policy.gpu_batch_size=2",
    "policy.num_gpu_batches=2",
)


def lane(*slices: Slice, **changes: Any) -> LaneTimeline:
    packed = b"".join(ROW.pack(KINDS.index(s.kind), *s[1:5], s.begin_s, s.end_s, s.bytes, s.flops) for s in slices)
    return LaneTimeline(packed, KINDS, **changes)


def ran(
    kind: StepKind, begin: float, end: float, unit: int = 1, batch: int = 0, token: int = 1, size: int = 0
) -> Slice:
    return Slice(str(kind), unit, batch, -1, token, begin, end, size, 7)


def save(results: Path, timeline: Timeline, record: Record | None = None) -> tuple[Path, Record]:
    """A record with a trace, as a run leaves them."""
    record = make_record() if record is None else record
    content = encode_trace(Trace(record.spec_hash, Evidence.MEASURED, timeline))
    record = replace(record, trace=write_trace(record, content, results))
    return write_record(record, results), record


def small() -> Timeline:
    """Two passes over one layer: the link loads, the gpu waits for it."""
    gpu = [
        ran(kind, begin + i, begin + i + 1, unit=i, token=token)
        for token, begin in ((0, 1.0), (1, 6.0))
        for i, kind in enumerate((StepKind.EMBED, StepKind.OUTPUT, StepKind.HEAD))
    ]
    loads = [ran(StepKind.LOAD_WEIGHTS, b, b + 2, batch=-1, token=0, size=10**9) for b in (0.0, 4.0)]
    return Timeline({"h2d": lane(*loads, bytes_per_s=1e9), "gpu": lane(*gpu), "d2h": lane()})


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Path:
    """The results folder of one real cell on the emulated accelerator."""
    folder = tmp_path_factory.mktemp("traced")
    answer = subprocess.run(
        [sys.executable, "-m", "flexgen_bench", *OVERRIDES],
        cwd=folder,
        env=os.environ | {"FLEXGEN_BENCH_CACHE": str(shared_cache)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    return folder / "results"


def test_a_run_leaves_a_trace_that_agrees_with_its_record(results: Path) -> None:
    [stored], problems = read_all(results)
    assert problems == []
    record = stored.record
    assert record.trace == f"traces/{stored.path.stem}.json.gz"
    trace = read_trace(stored.path.parent / record.trace)
    assert (trace.spec_hash, trace.evidence) == (record.spec_hash, Evidence.EMULATED)
    lanes = trace.timeline.lanes
    assert trace.timeline.dropped == 0
    assert lanes["h2d"].bytes_per_s == record.spec["hardware"]["links"]["h2d"]
    assert record.report.links["h2d"].bytes > 0
    for name, use in record.report.links.items():
        assert sum(s.bytes for s in lanes[name]) == use.bytes
    for name, busy_s in record.report.lane_busy_s.items():
        rounding = 1e-6 * (len(lanes[name]) + 1)
        assert sum(s.seconds for s in lanes[name]) == pytest.approx(busy_s, abs=rounding)
    # Every micro-batch of every pass went through every layer.
    spec = record.spec
    outputs = [s for s in lanes["gpu"] if s.kind in (StepKind.OUTPUT, StepKind.LAYER)]
    layers, gen_len = spec["model"]["shape"]["num_layers"], spec["workload"]["gen_len"]
    assert len(outputs) == layers * gen_len * 2
    assert len(find_passes(trace.timeline)) == gen_len
    assert {p.prefills for p in find_passes(trace.timeline)[1:]} == {False}


def test_the_files_of_a_real_run(results: Path, tmp_path: Path) -> None:
    run = find_run("latest", results)
    trace, picture = write_files(run, tmp_path / "new" / "folder")
    check_trace_events(json.loads(trace.read_text()), run)
    tree = ElementTree.parse(picture)
    text = "".join(tree.getroot().itertext())
    for words in (run.title, "EMULATED", "Whole repetition", "Prefill: pass 1", "Decode: pass", "load weights"):
        assert words in text
    assert write_files(run, tmp_path / "new" / "folder") == [trace, picture], "again, in place"


def check_trace_events(document: dict[str, Any], run: TracedRun) -> None:
    """The rules of the Trace Event Format for the kinds of events that are used."""
    names: dict[int, str] = {}
    ends: dict[int, int] = {}
    moved: dict[str, int] = {}
    for event in document["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert event["ph"] in ("M", "X", "C")
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
            if event["name"] == "thread_name":
                names[event["tid"]] = event["args"]["name"]
            continue
        assert isinstance(event["ts"], int)
        assert event["ts"] >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
            continue
        assert event["dur"] >= 0
        assert event["ts"] >= ends.get(event["tid"], 0), "slices of one lane overlap"
        ends[event["tid"]] = event["ts"] + event["dur"]
        name = names[event["tid"]]
        moved[name] = moved.get(name, 0) + event["args"]["bytes"]
    assert document["displayTimeUnit"] in ("ms", "ns")
    assert set(names.values()) == set(run.timeline.lanes)
    assert moved == {n: sum(s.bytes for s in found) for n, found in run.timeline.lanes.items() if len(found)}


def test_the_command_on_a_real_run(results: Path, tmp_path: Path, capsys: Any) -> None:
    [stored], _ = read_all(results)
    for name in (str(stored.path), stored.path.name, stored.path.stem, stored.record.spec_hash[:4], "latest"):
        assert main([name, "--results", str(results), "--out", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert stored.record.run_id in out
        assert "The busiest lane" in out
        assert "load_weights" in out
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".svg"]


def test_other_systems_have_no_trace_and_are_told_so(tmp_path: Path, capsys: Any) -> None:
    measured = write_record(make_record("accelerate"), tmp_path)
    failed = write_record(make_record("deepspeed", status=Status.OOM, samples=()), tmp_path)
    assert main([measured.stem, "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "a record with a trace" in error
    assert "python -m flexgen_bench system=accelerate" in error
    with pytest.raises(UserError, match="It ended as oom"):
        find_run(str(failed), tmp_path)
    with pytest.raises(UserError, match=r"No record in .* has a trace"):
        find_run("latest", tmp_path)


def test_an_unknown_run_lists_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There are no records in .* --results"):
        find_run("abc", tmp_path)
    path, record = save(tmp_path, small())
    other = write_record(make_record("accelerate"), tmp_path)
    with pytest.raises(UserError, match=f"Nearest: .*{path.stem}"):
        find_run(path.stem[:-1] + "x", tmp_path)
    wrong = record.spec_hash[:-2] + "zz"
    with pytest.raises(UserError, match=f"Nearest: .*{path.stem}"):
        find_run(wrong, tmp_path)
    with pytest.raises(UserError, match=f"one hash only. It fits .*{other.stem}"):
        find_run("run", tmp_path)  # both runs' names begin like that
    with pytest.raises(UserError, match="RUN = ''"):
        find_run("", tmp_path)


def test_of_reruns_the_newest_is_taken(tmp_path: Path) -> None:
    save(tmp_path, Timeline(), make_record(run=1))
    newest, record = save(tmp_path, small(), make_record(run=2))
    write_record(make_record("accelerate", run=3), tmp_path)
    assert find_run(record.spec_hash[:6], tmp_path).path == newest
    assert find_run("latest", tmp_path).path == newest, "the newest that has a trace"
    assert find_run("run1", tmp_path).timeline.lanes == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a usable trace|not a whole trace|trace version"),
        (b"no gzip", "not a whole trace"),
        (gzip.compress(b'{"trace_version": 1')[:-9], "not a whole trace"),
        (gzip.compress(b"{"), "not a whole trace"),
        (gzip.compress(b"[]"), "trace version None"),
        (gzip.compress(b'{"trace_version": 99}'), "trace version 99.*Update"),
        (gzip.compress(b'{"trace_version": 1}'), "not a usable trace"),
        (gzip.compress(b'{"trace_version": 1, "lanes": {"gpu": {"kinds": []}}}'), "not a usable trace"),
    ],
    # By name: the compressed bytes hold the time, and workers must agree on what a test is called.
    ids=["empty", "text", "cut", "no object", "a list", "later version", "no lanes", "no spans"],
)
def test_a_damaged_trace_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path, record = save(tmp_path, small())
    trace = path.parent / record.trace
    trace.write_bytes(content)
    with pytest.raises(StoreError, match=message) as caught:
        find_run("latest", tmp_path)
    assert str(trace) in str(caught.value)
    trace.unlink()
    with pytest.raises(StoreError, match=r"there is no trace .* Measure the cell again"):
        find_run("latest", tmp_path)


@pytest.mark.parametrize(
    ("column", "value"), [("kind", 99), ("gap_us", -1), ("unit", 10**6), ("bytes", "1"), ("token", None)]
)
def test_a_wrong_number_in_a_trace_is_refused(tmp_path: Path, column: str, value: Any) -> None:
    path, record = save(tmp_path, small())
    trace = path.parent / record.trace
    data = json.loads(gzip.decompress(trace.read_bytes()))
    data["lanes"]["gpu"][column][1] = value
    trace.write_bytes(gzip.compress(json.dumps(data).encode()))
    with pytest.raises(StoreError, match="not a usable trace"):
        read_trace(trace)


def test_the_trace_of_another_cell_is_refused(tmp_path: Path) -> None:
    record = make_record()
    content = encode_trace(Trace("f" * 16, Evidence.MEASURED, small()))
    write_record(replace(record, trace=write_trace(record, content, tmp_path)), tmp_path)
    with pytest.raises(StoreError, match="the trace of another cell"):
        find_run("latest", tmp_path)


def test_a_trace_is_never_overwritten_and_is_no_record(tmp_path: Path) -> None:
    _, record = save(tmp_path, small())
    with pytest.raises(StoreError, match="a trace of that name exists"):
        write_trace(record, b"", tmp_path)
    found, problems = read_all(tmp_path)
    assert (len(found), problems) == (1, [])


def test_records_from_before_traces_read_back_without_one(tmp_path: Path) -> None:
    path = write_record(make_record(), tmp_path)
    data = json.loads(path.read_text())
    del data["trace"]
    path.write_text(json.dumps(data | {"schema_version": 1}))
    assert read_record(path).trace == ""


steps = st.lists(
    st.tuples(
        st.sampled_from(StepKind),
        st.integers(0, 200),
        st.integers(-1, 50),
        st.integers(0, 9),
        st.integers(0, 10**7),
        st.integers(0, 10**7),
        st.integers(0, 2**40),
    ),
    max_size=30,
)


@settings(max_examples=50, deadline=None)
@given(steps, st.integers(0, 3), st.none() | st.floats(1, 1e12))
def test_any_lane_reads_back_to_the_microsecond(
    tmp_path_factory: pytest.TempPathFactory, found: Sequence[Any], dropped: int, rate: float | None
) -> None:
    slices, now = [], 0
    for kind, unit, batch, token, gap, duration, size in found:
        begin, now = now + gap, now + gap + duration
        slices.append(ran(kind, begin / 1e6, now / 1e6, unit, batch, token, size))
    timeline = Timeline({"h2d": lane(*slices, dropped=dropped, bytes_per_s=rate)})
    path = tmp_path_factory.mktemp("trace") / "t.json.gz"
    path.write_bytes(encode_trace(Trace("abc", Evidence.MEASURED, timeline)))
    back = read_trace(path).timeline
    assert list(back.lanes["h2d"]) == slices
    assert (back.dropped, back.lanes["h2d"].bytes_per_s) == (dropped, rate)


def test_times_count_from_the_origin_and_rounding_never_makes_steps_overlap(tmp_path: Path) -> None:
    slices = [ran(StepKind.ATTEND, 100 + i * 1.4e-6, 100 + (i + 1) * 1.4e-6) for i in range(50)]
    path = tmp_path / "t.json.gz"
    path.write_bytes(encode_trace(Trace("", Evidence.MEASURED, Timeline({"gpu": lane(*slices, origin_s=100.0)}))))
    back = list(read_trace(path).timeline.lanes["gpu"])
    assert back[0].begin_s == 0.0
    assert back[-1].end_s == pytest.approx(70e-6)
    assert all(b.begin_s >= a.end_s >= a.begin_s for a, b in pairwise(back))


def test_figures_of_a_small_timeline() -> None:
    found = summarise(small())
    assert found.wall_s == 9.0
    h2d, gpu = found.lanes
    assert (h2d.lane, h2d.steps, h2d.busy_s, h2d.bytes, h2d.bytes_per_s) == ("h2d", 2, 4.0, 2 * 10**9, 1e9)
    assert (gpu.lane, gpu.busy_s, gpu.is_link) == ("gpu", 6.0, False)
    assert found.kinds[0] == ("h2d", "load_weights", 2, 4.0)
    assert found.waiting is not None
    # The gpu is idle in 0-1 and 4-6; the link works in 0-2 and 4-6.
    assert (found.waiting.lane, found.waiting.idle_s) == ("gpu", 3.0)
    assert found.waiting.others == {"h2d": 1.0}
    assert found.waiting.nobody == pytest.approx(0.0)
    text = to_text(found)
    assert "66.7%" in text
    assert "100.0% h2d, 0.0% nobody" in text
    assert to_text(summarise(Timeline())) == "No lane did anything.\n"


def test_intervals() -> None:
    assert gaps([(1, 2), (2, 3), (5, 6)], 0, 6) == [(0, 1), (3, 5)]
    assert overlap([(0, 2), (4, 6)], [(1, 5)]) == 2
    assert overlap([], [(1, 5)]) == 0


def test_passes_of_a_small_timeline() -> None:
    first, second = find_passes(small())
    assert (first.begin_s, first.end_s, first.prefills, first.decodes) == (1.0, 6.0, True, False)
    assert (second.begin_s, second.end_s, second.prefills, second.decodes) == (6.0, 9.0, False, True)
    assert typical([first, second]) == [first, second]
    assert typical([first]) == [first]
    assert find_passes(Timeline({"h2d": small().lanes["h2d"]})) == []


def test_every_kind_of_step_has_a_colour_of_its_own() -> None:
    assert set(COLOURS) == set(StepKind)
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_many_narrow_steps_make_a_small_picture(tmp_path: Path) -> None:
    """Steps narrower than a pixel are drawn as shares: half the time busy is half the height."""
    count = 10 * MOST_BOXES
    narrow = [ran(StepKind.ATTEND, i * 1e-4, i * 1e-4 + 5e-5) for i in range(count)]
    _, record = save(tmp_path, Timeline({"gpu": lane(*narrow), "cpu": lane(narrow[0])}))
    picture = chart(find_run(record.run_id, tmp_path))
    ElementTree.fromstring(picture)
    assert len(picture) < 100_000
    assert "50% busy" in picture


def test_a_timeline_without_steps_still_makes_a_picture(tmp_path: Path) -> None:
    save(tmp_path, Timeline({"gpu": lane(dropped=4)}))
    run = find_run("latest", tmp_path)
    ElementTree.fromstring(chart(run))
    assert "the last 4 steps were not kept" in chart(run)
    assert trace_events(run)["otherData"]["dropped_steps"] == 4


@pytest.mark.parametrize("span", [3e-6, 1e-3, 0.7052, 9.9, 25.2, 3600.0])
def test_ticks_are_round_and_few(span: float) -> None:
    found = ticks(span)
    assert 3 <= len(found) <= 11
    assert found[0][0] == 0.0
    assert found[-1][0] <= span * (1 + 1e-9)
    assert len({label for _, label in found}) == len(found)
