"""Points are the records' numbers; what cannot be compared is not in one picture; what is missing is named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_bench.accuracy.compare.compare import Margins
from flexgen_bench.accuracy.compare.outcome import ModelOutcome, outcomes
from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.metrics import summarise
from flexgen_bench.core.model import DType
from flexgen_bench.core.record import Record
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.models.registry import family
from flexgen_bench.pictures.front import front
from flexgen_bench.pictures.gallery import NAMES, Wanted, data, pictures
from flexgen_bench.pictures.gather import Material, gather, material
from flexgen_bench.pictures.picture import Picture, Point, Source, point
from flexgen_bench.store.accuracy_store import StoredAccuracy
from flexgen_bench.store.reader import StoredRecord
from flexgen_bench.store.writer import write_record
from tests.support.accuracy_factory import choice_items, subject, task_record
from tests.support.record_factory import ENVIRONMENT, GIB, SHAPE, make_record, make_spec

W4 = Lossy(weights=Compression(4))
WEIGHTS = family(SHAPE.family).inventory(SHAPE).num_bytes(DType.BFLOAT16)


def machine(cap: int | None = 2 * GIB, name: str = "cpu") -> HardwareProfile:
    return HardwareProfile(name, Accelerator.NONE, cpu_memory_bytes=cap)


def of(*records: Record, accuracy: Sequence[ModelOutcome] = (), prices: dict[str, float] | None = None) -> Material:
    stored = [StoredRecord(Path(f"results/{r.suite}/{i}.json"), r) for i, r in enumerate(records)]
    return material(stored, accuracy, (), Path("results"), prices)


def points(picture: Picture, panel: int = 0) -> dict[str, list[tuple[float, float]]]:
    """By label and evidence."""
    return {
        f"{one.label}: {one.evidence.value}": [(p.x, p.y) for p in one.points] for one in picture.panels[panel].series
    }


def the(name: str, everything: Material, wanted: Wanted | None = None) -> Picture:
    (picture,) = pictures(name, everything, wanted).pictures
    return picture


def value(record: Record, metric: str) -> float:
    summary = summarise(record, metric)
    assert summary is not None
    return summary.value


class TestThroughputLatency:
    def test_points_are_the_records_figures(self) -> None:
        """Two batches of two prompts each: a batch takes half of the whole."""
        one, other = make_record("a"), make_record("b", [(0.5, 1.0)] * 2, batch_size=4)
        everything = of(one, other)
        picture = the("throughput-latency", everything)
        assert points(picture) == {
            "a: MEASURED": [(pytest.approx(16 / 3 / 2), pytest.approx(value(one, "generation_tok_per_s")))],
            "b: MEASURED": [(pytest.approx(1.5), pytest.approx(16 / 1.5))],
        }
        (shown,) = picture.panels[0].series[0].points
        summary = summarise(one, "generation_tok_per_s")
        assert summary is not None
        assert shown.y_range == pytest.approx((summary.low, summary.high))
        assert (shown.label, shown.source) == ("batch 2", Source("run0", one.spec_hash, "default/0.json"))
        first = the("throughput-first-token", everything)
        assert points(first)["a: MEASURED"][0][0] == pytest.approx(value(one, "first_token_s"))
        later = the("throughput-later-token", everything)
        assert points(later)["a: MEASURED"][0][0] == pytest.approx(value(one, "time_per_later_token_s"))

    def test_a_single_repetition_has_no_range(self) -> None:
        picture = the("throughput-latency", of(make_record("a", [(1, 2)]), make_record("b")))
        assert [p.y_range is None for s in picture.panels[0].series for p in s.points] == [True, False]

    def test_machines_models_and_workloads_are_never_mixed(self) -> None:
        """Each differs in one respect from the first, and is a picture of its own or none."""
        base = make_spec("a")
        shape = replace(SHAPE, name="other")
        changed = [
            {"hardware": machine(GIB)},
            {"hardware": machine(name="box")},
            {"model": ModelSpec(shape)},
            {"workload": replace(base.workload, gen_len=5)},
            {"workload": replace(base.workload, num_prompts=5)},
            {"dtype": DType.FLOAT32},
            {"threads": 1},
        ]
        records = [make_record(spec=base), make_record(spec=make_spec("b"))]
        records += [make_record(spec=make_spec("a", **change)) for change in changed]
        elsewhere = ENVIRONMENT | {"cpu": {"model": "Another", "usable_cores": 2}}
        records.append(make_record("a", environment=elsewhere))
        found = pictures("throughput-latency", of(*records))
        (picture,) = found.pictures
        assert sum(len(s.points) for s in picture.panels[0].series) == 2
        assert len(found.missing) == len(changed) + 1
        assert "Another" in " ".join(found.missing)

    def test_evidence_never_shares_a_series_or_a_front(self) -> None:
        slow, fast = make_record("a", [(1.0, 9.0)], batch_size=4), make_record("b", [(1.0, 1.0)], batch_size=1)
        emulated = replace(make_record("a", [(0.1, 0.1)], run=1), evidence=Evidence.EMULATED)
        picture = the("throughput-latency", of(slow, fast, emulated))
        assert set(points(picture)) == {"a: MEASURED", "a: EMULATED", "b: MEASURED"}
        assert all("MEASURED" in guide.label for guide in picture.panels[0].guides)
        assert any("EMULATED" in note for note in picture.notes)

    def test_failures_are_told_below(self) -> None:
        failed = make_record("c", (), status=Status.OOM, reason="needs 5 GiB\nmore", samples=())
        picture = the("throughput-latency", of(make_record("a"), make_record("b"), failed))
        assert "Not shown: c: oom, needs 5 GiB." in picture.notes

    @given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=20))
    def test_the_front_is_what_nothing_beats(self, places: list[tuple[int, int]]) -> None:
        """Brute force: a point is on the front unless another is at least as good in both respects and better in
        one."""

        def beaten(p: Point) -> bool:
            return any(q.x <= p.x and q.y >= p.y and (q.x, q.y) != (p.x, p.y) for q in all_points)

        source = Source("", "", "")
        all_points = [point(x, y, "", source, x_range=None, y_range=None) for x, y in places]
        kept = front(all_points)
        assert {(p.x, p.y) for p in kept} == {(p.x, p.y) for p in all_points if not beaten(p)}
        assert kept == sorted(kept, key=lambda p: p.x)
        assert len(kept) == len({p.x for p in kept})


class TestMemory:
    def test_a_cap_is_a_share_of_the_uncompressed_weights(self) -> None:
        specs = [
            make_spec("a", hardware=machine(share * WEIGHTS // 4), lossy=lossy)
            for share, lossy in ((1, Lossy()), (2, Lossy()), (2, W4))
        ]
        rows = [make_record(spec=spec, times=[(1.0, t)]) for spec, t in zip(specs, (7, 3, 1), strict=True)]
        picture = the("memory", of(*rows))
        assert points(picture) == {
            "a: MEASURED": [(pytest.approx(25), pytest.approx(2)), (pytest.approx(50), pytest.approx(4))],
            "a (4-bit weights): MEASURED": [(pytest.approx(50), pytest.approx(8))],
        }
        assert all(series.joined for series in picture.panels[0].series)

    def test_the_fastest_run_of_a_cap_and_systems_that_never_ran(self) -> None:
        slow, fast = make_record("a", [(1, 7)]), make_record("a", [(1, 1)], run=1)
        other = make_record(spec=make_spec("a", hardware=machine(GIB)))
        dead = make_record("b", (), samples=(), status=Status.OOM, reason="too large")
        picture = the("memory", of(slow, fast, other, dead))
        a, b = picture.panels[0].series
        assert [p.source.run_id for p in a.points] == ["run0", "run1"]
        assert (b.points, [f.status for f in b.failures]) == ((), ["oom"])
        assert "(1 left out)" in " ".join(picture.notes)

    def test_one_cap_is_no_ladder(self) -> None:
        found = pictures("memory", of(make_record("a"), make_record("b")))
        assert not found.pictures
        assert "gpu.cpu_memory=SIZE" in found.missing[0]


class TestPrice:
    def test_input_and_output_are_the_bill_together(self) -> None:
        """3.6 USD an hour is a thousandth of a dollar a second."""
        record = make_record("a", [(2.0, 3.0)])
        picture = the("price", of(record, prices={"cpu": 3.6}))
        ((x_in, y),) = points(picture, 0)["a: MEASURED"]
        ((x_out, same_y),) = points(picture, 1)["a: MEASURED"]
        assert x_in / 1e6 * 32 + x_out / 1e6 * 16 == pytest.approx(5 * 0.001)
        assert (x_in, y, same_y) == (pytest.approx(2 * 0.001 / 32 * 1e6), pytest.approx(16 / 5), y)

    def test_several_machines_are_told_apart(self) -> None:
        box = make_record(spec=make_spec("a", hardware=machine(name="box")))
        picture = the("price", of(make_record("a"), box, prices={"cpu": 1.0, "box": 2.0}))
        assert len(points(picture)) == 2
        assert "box, host memory 2.00 GiB at 2 USD an hour" in picture.facts["hardware"]
        assert [one.of.partition(",")[0] for one in picture.panels[0].series] == ["box", "cpu"]

    def test_a_machine_without_a_price_is_named(self) -> None:
        found = pictures("price", of(make_record("a")))
        assert not found.pictures
        assert "an hour of cpu" in found.missing[0]
        assert "--price" in found.missing[0]


class TestPredictedMeasured:
    def test_points_and_the_diagonal(self) -> None:
        told = make_record("a", [(1.0, 1.0)], prediction={"tok_per_s": 10.0})
        picture = the("predicted-measured", of(told, make_record("b")))
        assert points(picture) == {"a: MEASURED": [(pytest.approx(8), pytest.approx(10))]}
        assert picture.panels[0].guides[0].points == ((8, 8), (10, 10))
        assert "Not shown: 1 runs without a prediction." in picture.notes
        assert "25 % at the median" in picture.notes[0]

    def test_labels_are_what_tells_runs_apart(self) -> None:
        """Two of one model and workload differ by their cap alone; the third by its workload, whatever its cap."""
        workload = replace(make_spec("a").workload, name="9-4", prompt_len=9)
        specs = [make_spec("a"), make_spec("a", hardware=machine(GIB)), make_spec("a", workload=workload)]
        picture = the("predicted-measured", of(*(make_record(spec=s, prediction={"tok_per_s": 1.0}) for s in specs)))
        labels = sorted(p.label for p in picture.panels[0].series[0].points)
        assert labels == ["8-4, host 1.00 GiB", "8-4, host 2.00 GiB", "9-4, host 2.00 GiB"]

    def test_records_without_predictions_are_counted(self) -> None:
        found = pictures("predicted-measured", of(make_record("a"), make_record("b")))
        assert "none of 2 records has a prediction" in found.missing[0]


class TestAccuracySpeed:
    def accuracy(self, **changes: Any) -> list[ModelOutcome]:
        """W4 loses five of 100 questions."""
        exact = task_record(choice_items(100, 1.0), subject=subject(**changes))
        w4 = task_record(choice_items(100, 1.0, flip=range(5)), "w4", subject=subject("w4", **changes))
        return outcomes(StoredAccuracy([(Path("a"), exact), (Path("b"), w4)], [], []), Margins())

    def test_a_point_is_two_ratios_of_records(self) -> None:
        exact = make_record("flexgen", [(1, 3)])
        fast = make_record(spec=make_spec("flexgen", lossy=W4), times=[(1, 1)])
        picture = the("accuracy-speed", of(exact, fast, accuracy=self.accuracy()))
        (shown,) = picture.panels[0].series[0].points
        assert (shown.x, shown.y) == (pytest.approx(2), pytest.approx(-5))
        assert shown.y_range is not None
        assert shown.y_range[0] < -5 < shown.y_range[1]
        assert shown.label == "w4 (4-bit weights, scored in float32)"

    @pytest.mark.parametrize(
        ("records", "said"),
        [
            (("exact",), "accuracy of w4 is known, its speed is not"),
            (("w4",), "no uncompressed run of flexgen"),
            (("exact", "w8"), "its accuracy is not known; python -m flexgen_bench accuracy model=tiny"),
        ],
    )
    def test_what_is_missing(self, records: Sequence[str], said: str) -> None:
        kinds = {"exact": Lossy(), "w4": W4, "w8": Lossy(weights=Compression(8))}
        made = [make_record(spec=make_spec("flexgen", lossy=kinds[kind])) for kind in records]
        found = pictures("accuracy-speed", of(*made, accuracy=self.accuracy()))
        assert not found.pictures
        assert said in " ".join(found.missing)


class TestGallery:
    def test_wishes_narrow_and_unknown_ones_list_what_there_is(self) -> None:
        everything = of(make_record("a"), make_record("b"), make_record("c"))
        assert set(points(the("throughput-latency", everything, Wanted(machine="some cpu", model="tiny")))) == {
            "a: MEASURED",
            "b: MEASURED",
            "c: MEASURED",
        }
        for wanted in (Wanted(model="tinny"), Wanted(machine="h100"), Wanted(workload="9"), Wanted(system="d")):
            with pytest.raises(UserError, match="one of"):
                pictures("memory", everything, wanted)
        with pytest.raises(UserError, match="throughput-latency"):
            pictures("throughput", everything)

    def test_json_has_labels_sources_and_what_is_missing(self) -> None:
        document = json.loads(json.dumps(data(of(make_record("a"), make_record("b"))), allow_nan=False))
        assert set(document) == {"pictures", "missing", "problems"}
        series = document["pictures"][0]["panels"][0]["series"][0]
        assert series["label"] == "a"
        assert series["points"][0]["run_id"] == "run0"
        assert set(document["missing"]) <= set(NAMES)
        keys = [picture["key"] for picture in document["pictures"]]
        assert len(set(keys)) == len(keys)

    def test_broken_records_hide_nothing(self, tmp_path: Path) -> None:
        """A file cut short, a record of a schema to come, and one whose spec is of nobody: all named, two shown."""
        for name in "ab":
            path = write_record(make_record(name), tmp_path)
        future = json.loads(path.read_text()) | {"schema_version": 99}
        (path.parent / "future.json").write_text(json.dumps(future))
        (path.parent / "cut.json").write_text(path.read_text()[:500])
        strange = json.loads(path.read_text())
        strange |= {"spec": {"system": "c"}, "spec_hash": "0" * 16}
        (path.parent / "strange.json").write_text(json.dumps(strange))
        everything = gather(tmp_path)
        assert sorted(problem.path.stem for problem in everything.problems) == ["cut", "future", "strange"]
        assert len(points(the("throughput-latency", everything))) == 2

    def test_no_records_at_all(self, tmp_path: Path) -> None:
        for name in NAMES:
            assert "measure something first" in pictures(name, gather(tmp_path)).missing[0]
        with pytest.raises(UserError, match="results_dir"):
            gather(tmp_path / "absent")
