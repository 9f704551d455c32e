"""What ran on one device and what on several are never rows of one table, nor points of one picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flexgen_bench.config.build import hardware_profile
from flexgen_bench.config.paths import conf_dir
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.model import DType
from flexgen_bench.core.simulated import Simulated, SystemModel
from flexgen_bench.core.status import Status
from flexgen_bench.pictures.facets import facets
from flexgen_bench.pictures.from_prediction import run_of_prediction
from flexgen_bench.pictures.from_record import run_of_record
from flexgen_bench.published.lookup import is_published_machine
from flexgen_bench.report.devices import devices, devices_of
from flexgen_bench.report.prediction_json import row_json
from flexgen_bench.report.prediction_table import by_job, heading
from flexgen_bench.report.rows import build_rows
from flexgen_bench.store.reader import StoredRecord
from flexgen_bench.trackers.cell_run import cell_run
from tests.support.record_factory import ENVIRONMENT, GIB, SHAPE, make_record, make_spec

ONE = HardwareProfile("t4", Accelerator.CUDA, GIB, GIB, GIB)
MACHINES = {
    "t4": ONE,
    "4 x t4": replace(ONE, count=4),
    "2 x t4": replace(ONE, count=2),
    "2 x t4 (10 + 22 layers)": replace(ONE, count=2, layers_per_rank=(10, 22)),
    "t4, every layer shared by 4": replace(ONE, tensor_parallel=4),
}


def simulated(machine: HardwareProfile) -> Simulated:
    job = Job(SHAPE, DType.FLOAT16, machine, 8, 4, 4)
    return Simulated(make_spec("s", hardware=machine), job, SystemModel("m:P"), Status.UNAVAILABLE, "no")


@pytest.mark.parametrize("words", MACHINES)
def test_devices_in_words(words: str, tmp_path: Path) -> None:
    machine = MACHINES[words]
    assert devices_of(machine) == devices(to_json(machine)) == words
    assert f"hardware {words} (" in heading(simulated(machine))
    record = make_record(spec=make_spec("s", hardware=machine))
    stored = StoredRecord(Path("results/r.json"), record)
    (row,) = build_rows([stored])
    assert row.hardware == words
    measured = run_of_record(stored, Path("results"), {words: 3.0, "else": 1.0})
    assert (measured.setting.hardware, measured.price_per_hour) == (words, 3.0)
    predicted = run_of_prediction(row_json(simulated(machine), Path()), "f", {})
    assert predicted.setting.hardware == words
    where = {"spec_hash": record.spec_hash, "evidence": "MEASURED", "results_dir": tmp_path}
    tracked = cell_run(record.spec, "suite", {}, ENVIRONMENT, **where)  # type: ignore[arg-type]
    assert tracked.config["hardware"] == words


def test_other_devices_are_another_table_and_another_picture() -> None:
    rows = [simulated(machine) for machine in MACHINES.values()]
    assert len(by_job(rows)) == len(MACHINES)
    runs = [run_of_prediction(row_json(row, Path()), "f", {}) for row in rows]
    assert len({facet.key("latency") for facet in facets(runs)}) == len(MACHINES)


def test_several_devices_are_not_the_papers_machine() -> None:
    """The tables are of one T4: four would have been divided by it, as the model's error or as a speed-up."""
    tables, t4 = conf_dir() / "paper" / "tables.csv", hardware_profile("t4")
    assert is_published_machine(tables, t4)
    assert not is_published_machine(tables, replace(t4, count=4))
    assert not is_published_machine(tables, replace(t4, tensor_parallel=4))
