"""What lies on disk stays what it is: records, accuracy records and predictions are read and written again as they
were, and a spec that is read back has the hash that its record is found by."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.core.cell import CellSpec
from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.record import SCHEMA_VERSION
from flexgen_bench.report.rows import build_rows
from flexgen_bench.report.table import to_csv
from flexgen_bench.store.accuracy_store import accuracy_files, read_mode, read_task, to_bytes
from flexgen_bench.store.kept_predictions import load, text_of
from flexgen_bench.store.reader import StoredRecord, read_all, read_record, record_files
from flexgen_bench.store.writer import to_bytes as record_bytes

RESULTS = Path(__file__).resolve().parents[2] / "results"
RECORDS = list(record_files(RESULTS))
ADDED_SINCE = {1: {"trace": "", "prediction": {}}, 2: {"prediction": {}}, 3: {}}


def said_again(stored: Any, again: Any) -> Any:
    """What is written now of all that was written then; what older documents did not have yet is left out."""
    if isinstance(stored, Mapping) and isinstance(again, Mapping):
        return {key: said_again(stored[key], again[key]) for key in stored}
    return again


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_a_record_is_written_as_it_was_read(path: Path) -> None:
    stored = json.loads(path.read_text())
    upgraded = stored | ADDED_SINCE[stored["schema_version"]] | {"schema_version": SCHEMA_VERSION}
    assert json.loads(record_bytes(read_record(path))) == upgraded
    if stored["schema_version"] == SCHEMA_VERSION:
        assert record_bytes(read_record(path)) == path.read_bytes()


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.name)
def test_the_spec_of_a_record_is_the_cell_that_it_is_found_by(path: Path) -> None:
    record = read_record(path)
    spec = from_json(CellSpec, record.spec, "spec")
    assert spec.spec_hash == record.spec_hash
    assert said_again(record.spec, to_json(spec)) == dict(record.spec)


def test_policies_that_ran_are_read_and_written_as_they_were() -> None:
    requested = [dict(read_record(path).report.requested) for path in RECORDS]
    ran = [(data, policy) for data in requested if (policy := Policy.stated_in(data)) is not None]
    assert len(ran) > 5
    for data, policy in ran:
        assert said_again(data, to_json(policy)) == data


def test_accuracy_records_are_written_as_they_were_read() -> None:
    paths = list(accuracy_files(RESULTS))
    assert len(paths) > 20
    for path in paths[::3]:
        record = read_mode(path) if path.name.startswith("_mode--") else read_task(path)
        stored = json.loads(gzip.decompress(path.read_bytes()))
        again = json.loads(gzip.decompress(to_bytes(record)))
        assert said_again(stored, again) | {"schema_version": stored["schema_version"]} == stored, path.name


def test_shipped_predictions_are_written_as_they_were_read() -> None:
    path = RESULTS / "predictions.json"
    answers = load(path)
    assert len(answers) > 100
    assert json.loads(text_of(answers)) == json.loads(path.read_text(encoding="utf-8"))


def test_pages_of_records_are_those_that_are_shipped() -> None:
    stored, problems = read_all(RESULTS)
    assert problems == []
    suites: dict[str, list[StoredRecord]] = {}
    for one in stored:
        suites.setdefault(one.record.suite, []).append(one)
    assert len(suites) >= 4
    for suite, records in suites.items():
        shipped = (RESULTS.parent / "reports" / f"{suite}.csv").read_text(encoding="utf-8")
        assert to_csv(build_rows(records), RESULTS) == shipped, suite
