"""Tables hold every record, and figures that follow from its raw samples."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.cli.report import main
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.digits import TIMED
from flexgen_bench.core.record import Record, SystemReport
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.core.workload import PromptKind
from flexgen_bench.report.rows import Row, build_rows
from flexgen_bench.report.table import print_table, to_csv, to_markdown
from flexgen_bench.store.reader import StoredRecord, read_all
from flexgen_bench.store.writer import write_record
from tests.support.record_factory import GIB, make_record, make_samples, make_spec

# The paper's tables have tests of their own.
NO_PAPER = ("--tables", "none")


def rows_of(*records: Record) -> list[Row]:
    return build_rows([StoredRecord(Path(f"default/{i}.json"), r) for i, r in enumerate(records)])


def by_system(rows: list[Row]) -> dict[str, Row]:
    return {row.system: row for row in rows}


def csv_rows(rows: list[Row]) -> dict[str, dict[str, str]]:
    return {r["system"]: r for r in csv.DictReader(io.StringIO(to_csv(rows, Path())))}


def failed(system: str, status: Status, reason: str) -> Record:
    return make_record(system, status=status, reason=reason, samples=(), report=SystemReport())


def test_the_tables_figures_are_those_of_the_raw_samples(tmp_path: Path) -> None:
    times = {"flexgen": [(1.0, 2.5), (1.2, 2.4)], "accelerate": [(2.0, 9.0 + 0.5 * i) for i in range(6)]}
    for system, pairs in times.items():
        write_record(make_record(system, pairs), tmp_path)
    stored, _ = read_all(tmp_path)
    table = csv_rows(build_rows(stored))
    for system, pairs in times.items():
        generated = sum(s.generated_tokens for s in make_samples(pairs))
        seconds = sum(p + d for p, d in pairs)
        row = table[system]
        tokens = {"generation": generated, "prefill": 32 * len(pairs), "decode": 12 * len(pairs)}
        spent = {"generation": seconds, "prefill": sum(p for p, _ in pairs), "decode": sum(d for _, d in pairs)}
        for name, count in tokens.items():
            told = float(row[f"{name}_tok_per_s"])
            assert told == pytest.approx(count / spent[name], rel=0.5 * 10.0 ** (1 - TIMED))
        assert int(row["repetitions"]) == len(pairs)
    assert table["flexgen"]["generation_tok_per_s_interval"] == "range"
    assert table["accelerate"]["generation_tok_per_s_interval"] == "95% bootstrap"
    text = to_markdown(build_rows(stored))
    assert "**4.51 (range 4.44 to 4.57, n=2)**" in text
    assert "1.31 (95% CI" in text


def test_memory_and_disk_columns() -> None:
    io_counts = [{"storage_read_bytes": GIB}, {"storage_read_bytes": 3 * GIB}]
    process = {"io_per_repetition": io_counts, "peak_resident_bytes": 3 * GIB}
    counted = make_record("a", [(1.0, 1.0), (1.0, 1.0)], environment={"process": process})
    told = make_record("b", [(1.0, 1.0), (1.0, 1.0)], environment={}, memory_cap={})
    rows = by_system(rows_of(counted, told))
    assert rows["a"].disk is not None
    assert rows["a"].disk.bytes_per_repetition == 2 * GIB
    assert rows["a"].disk.mean_bytes_per_s == GIB
    text = to_markdown(list(rows.values()))
    assert "1.50 GiB of 2.00 GiB, enforced (1.00 GiB without cache)" in text
    assert "1.00 GiB of 2.00 GiB, not enforced" in text
    assert "2.00 GiB, 1.00 GiB/s |" in text
    assert "3.00 GiB, 1.50 GiB/s (own count)" in text


def test_failures_stay_in_the_table_with_their_reason() -> None:
    rows = rows_of(
        make_record("flexgen"),
        failed("deepspeed", Status.OOM, "killed at the memory | cap\nof 2 GiB"),
        failed("vendor", Status.UNAVAILABLE, "needs <libaio>"),
        make_record("broken", status=Status.INVALID, reason="wrong lengths"),
    )
    text = to_markdown(rows)
    assert "| deepspeed | OOM: killed at the memory \\| cap of 2 GiB |" in text
    assert "- vendor: unavailable. needs &lt;libaio>" in text
    assert "| broken | invalid: wrong lengths |" in text
    assert by_system(rows)["broken"].generation is None
    assert csv_rows(rows)["deepspeed"]["status"] == "oom"
    assert rows[0].system == "flexgen"


OTHER = {"cpu": {"model": "Another"}}


def test_only_ok_measured_rows_of_one_group_and_machine_compete() -> None:
    slow, fast = [(4.0, 4.0)], [(1.0, 1.0)]
    rows = by_system(
        rows_of(
            make_record("slower", [(5.0, 5.0)]),
            make_record("slow", slow),
            make_record("emulated", fast, evidence=Evidence.EMULATED),
            make_record("invalid", fast, status=Status.INVALID, reason="x"),
            make_record("other dtype", fast, spec=make_spec("other dtype", threads=1)),
        )
    )
    assert [name for name, row in rows.items() if row.best] == ["slow"]
    moved = [make_record(name, times, environment=OTHER) for name, times in (("c", fast), ("d", slow))]
    mixed = rows_of(make_record("a", slow), make_record("b", [(5.0, 5.0)]), *moved)
    assert {name for name, row in by_system(mixed).items() if row.best} == {"a", "c"}
    text = to_markdown(mixed)
    assert "on Some CPU, 2 usable cores" in text
    assert "on Another" in text
    assert not rows_of(make_record("alone"))[0].best


def test_evidence_is_marked_in_every_cell_that_was_not_measured() -> None:
    text = to_markdown(rows_of(make_record("a"), make_record("b", evidence=Evidence.SIMULATED)))
    measured, simulated = (
        next(line for line in text.splitlines() if line.startswith(f"| {system} |")) for system in "ab"
    )
    cells = simulated.split(" | ")
    assert all("(S)" in cells[i] for i in (1, 4, 5, 6, 7))
    assert "SIMULATED" in simulated
    assert "(S)" not in measured
    assert "(S) = SIMULATED; figures without a mark are MEASURED." in text


def test_same_tokens_against_the_reference() -> None:
    ids = [[1, 2], [3, 4], [5, 6]]

    def outputs(tokens: Any, **more: Any) -> dict[str, Any]:
        return {"token_ids": tokens, **more}

    rows = by_system(
        rows_of(
            make_record("reference", outputs=outputs(ids, reference=True)),
            make_record("same", outputs=outputs(ids)),
            make_record("one off", outputs=outputs([*ids[:2], [5, 7]])),
            make_record("fewer", outputs=outputs(ids[:2])),
            make_record("silent", outputs={}),
            make_record("elsewhere", outputs=outputs(ids), spec=make_spec("elsewhere", threads=1)),
        )
    )
    assert {name: str(row.same_tokens) for name, row in rows.items()} == {
        "reference": "reference",
        "same": "= reference",
        "one off": "2 of 3 prompts equal",
        "fewer": "0 of 3 prompts equal",
        "silent": "-",
        "elsewhere": "-",
    }


def test_a_lossy_run_is_named_so_and_neither_compared_nor_marked_fastest() -> None:
    four, eight = (Lossy(weights=Compression(bits)) for bits in (4, 8))
    rows = rows_of(
        make_record("reference", [(4.0, 4.0)], outputs={"token_ids": [[1]], "reference": True}),
        make_record("flexgen", [(2.0, 2.0)], outputs={"token_ids": [[1]]}),
        make_record("flexgen", [(1.0, 1.0)], outputs={"token_ids": [[7]]}, spec=make_spec("flexgen", lossy=four)),
        make_record("lossy", outputs={"token_ids": [[9]], "reference": True}, spec=make_spec("lossy", lossy=eight)),
    )
    by_label = {row.label: row for row in rows}
    assert [row.label for row in rows if row.best] == ["flexgen"]
    assert str(by_label["flexgen"].same_tokens) == "= reference"
    assert str(by_label["flexgen (4-bit weights)"].same_tokens) == "lossy"
    assert str(by_label["lossy (8-bit weights)"].same_tokens) == "lossy"
    text = to_markdown(rows)
    assert "| flexgen (4-bit weights) |" in text
    assert "computes with compressed numbers" in text
    assert "compressed" not in to_markdown(rows_of(make_record("flexgen")))
    table = list(csv.DictReader(io.StringIO(to_csv(rows, Path()))))
    assert {(r["system"], r["lossy"]) for r in table} == {
        ("reference", ""),
        ("flexgen", ""),
        ("flexgen", "4-bit weights"),
        ("lossy", "8-bit weights"),
    }


def test_a_failed_reference_is_no_reference() -> None:
    outputs = {"token_ids": [[1]], "reference": True}
    broken = make_record("reference", outputs=outputs, status=Status.INVALID, reason="x")
    rows = by_system(rows_of(broken, make_record("other", outputs={"token_ids": [[1]]})))
    assert str(rows["other"].same_tokens) == "-"


def fill(results: Path) -> None:
    for index, (system, texts) in enumerate(
        [("transformers", ["once *upon*", "b"]), ("flexgen", ["once *upon*", "c"])]
    ):
        record = make_record(
            system,
            [(1.0 + index, 2.0)],
            spec=make_spec(system, PromptKind.TEXT),
            outputs={"token_ids": [[1], [2]], "texts": texts, "reference": index == 0},
        )
        write_record(record, results)
    write_record(make_record(suite="disk"), results)
    (results / "default" / "bad--record--x--0--1.json").write_text("{")


def test_reports_are_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    fill(tmp_path / "results")
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([str(tmp_path / "results"), str(first), *NO_PAPER]) == 0
    here = os.path.relpath(tmp_path)
    assert main([f"{here}/results", f"{here}/second", *NO_PAPER]) == 0
    assert sorted(os.listdir(first)) == ["default.csv", "default.md", "disk.csv", "disk.md", "index.md", "pictures"]
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*.*"))
    assert len([name for name in names if name.endswith(".svg")]) == 3, "three latencies of one setting"
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
        assert str(tmp_path) not in (first / name).read_text()
    page = (first / "default.md").read_text()
    assert "- flexgen, transformers: once \\*upon\\*" in page
    assert "- transformers: b" in page
    assert "could not be used" in page
    assert "bad--record--x--0--1.json is not a whole JSON document" in page
    assert "python -m flexgen_bench system=flexgen" in page
    assert "reads go through the page cache" in page
    index = (first / "index.md").read_text()
    assert "[default](default.md)" in index
    assert "bad--record" in index
    assert "bad--record" not in (first / "disk.md").read_text()


def test_readme_tables_are_replaced_and_the_rest_is_kept(tmp_path: Path) -> None:
    fill(tmp_path / "results")
    readme = tmp_path / "README.md"
    readme.write_text("# T\n<!-- table:default -->\nstale\n<!-- /table -->\nend\n")
    arguments = [str(tmp_path / "results"), str(tmp_path / "out"), "--readme", str(readme), *NO_PAPER]
    assert main(arguments) == 0
    once = readme.read_text()
    assert "stale" not in once
    assert once.startswith("# T\n<!-- table:default -->\n**tiny")
    assert once.endswith("<!-- /table -->\nend\n")
    assert main(arguments) == 0
    assert readme.read_text() == once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no table", "no markers"),
        ("<!-- table:default -->", "marked in pairs"),
        ("<!-- /table -->", "marked in pairs"),
        ("<!-- table:default --><!-- table:disk --><!-- /table -->", "marked in pairs"),
        ("<!-- table:defualt --><!-- /table -->", "Did you mean 'default'"),
    ],
)
def test_wrong_markers_are_refused(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path / "results")
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert main([str(tmp_path / "results"), str(tmp_path / "o"), "--readme", str(readme)]) == 2
    assert message in capsys.readouterr().err
    assert readme.read_text() == text


def test_an_absent_results_folder_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    assert "an existing folder of records" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_print_table_without_a_terminal_is_plain_and_complete(tmp_path: Path) -> None:
    paths = [
        write_record(make_record("flexgen", [(1.0, 1.0)]), tmp_path),
        write_record(make_record("accelerate", [(2.0, 2.0)]), tmp_path),
        write_record(failed("deepspeed", Status.OOM, "killed by the cap, " + "x" * 300), tmp_path),
    ]
    missing = tmp_path / "default" / "gone.json"
    out = io.StringIO()
    print_table([*paths, missing], file=out)
    text = out.getvalue()
    assert text.isascii()
    assert "\x1b" not in text
    assert re.search(r"\| flexgen +\| \* 8\.00 +\|", text)
    assert re.search(r"\| deepspeed +\| OOM +\|", text)
    assert "deepspeed: OOM. killed by the cap, " + "x" * 300 in text
    assert f"not shown: cannot read record {missing}" in text


def test_the_module_runs_without_torch(tmp_path: Path) -> None:
    """Tables rebuild from records alone, on a machine that could run none of the systems."""
    fill(tmp_path / "results")
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from flexgen_bench.cli.report import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "results"), str(tmp_path / "out"), *NO_PAPER]
    assert subprocess.run(arguments, check=False, capture_output=True).returncode == 0


def test_figures_of_benchmark_scripts_are_not_taken_for_records(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "disk.json").write_text('{"rows": []}')
    records, problems = read_all(tmp_path)
    assert not list(records)
    assert not list(problems)
