"""Throughput against memory: what the table says of who is faster, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.record import Record
from flexgen_bench.core.simulated import Simulated, SystemModel
from flexgen_bench.core.status import Status
from flexgen_bench.report.ladder.markdown import ladder_lines
from flexgen_bench.report.ladder.predicted import predicted_page
from flexgen_bench.report.ladder.rungs import Ladder, measured_ladders
from flexgen_bench.report.ladder.verdicts import Standing, sentences, verdicts
from flexgen_bench.report.page import suite_page
from flexgen_bench.report.rows import build_rows
from flexgen_bench.store.reader import StoredRecord
from tests.support.record_factory import ENVIRONMENT, make_record, make_spec

WEIGHTS = 2**31
TOKENS = 16  # of a repetition of the factory's workload


def rung(share: float, system: str, rates: Sequence[float], lossy: Lossy | None = None, **changes: Any) -> Record:
    """A record with these tokens/s in its repetitions; none: it ran out of memory."""
    cap = int(share * WEIGHTS)
    hardware = HardwareProfile("cpu", Accelerator.NONE, cpu_memory_bytes=cap, weight_shares={"cpu": share})
    spec = make_spec(system, hardware=hardware, **({} if lossy is None else {"lossy": lossy}))
    times = [(0.5 * TOKENS / rate, 0.5 * TOKENS / rate) for rate in rates]
    values: dict[str, Any] = {"memory_cap": {"requested_bytes": cap, "enforced": True}}
    if not rates:
        values |= {"status": Status.OOM, "reason": "killed for memory\nin stage check"}
    return make_record(system, times, spec, **(values | changes))


def ladders(*records: Record) -> list[Ladder]:
    return measured_ladders(build_rows([StoredRecord(Path(f"ladder/{i}.json"), r) for i, r in enumerate(records)]))


def text(*records: Record) -> str:
    return "\n".join(ladder_lines(ladders(*records)))


def test_standings_and_the_crossover() -> None:
    records = [
        rung(0.25, "flexgen", [20.0, 22.0]),
        rung(0.25, "llama_cpp", [4.0, 5.0]),
        rung(0.25, "accelerate", []),
        rung(0.5, "flexgen", [20.0, 30.0]),
        rung(0.5, "llama_cpp", [25.0, 28.0]),
        rung(1.5, "flexgen", [40.0, 41.0]),
        rung(1.5, "llama_cpp", [60.0, 61.0]),
    ]
    [ladder] = ladders(*records)
    found = verdicts(ladder, 16)
    assert [v.standing for v in found] == [Standing.AHEAD, Standing.UNDECIDED, Standing.BEHIND]
    assert found[0].low is not None
    assert found[0].low == pytest.approx(20 / 5)
    said = list(sentences(found))
    assert said[0].startswith("flexgen is faster than every other system at 25 %: 4.71x")
    assert said[1] == "At 150 % llama_cpp is faster: 1.49x flexgen."
    assert said[2].startswith("Undecided at 50 %")
    assert said[3] == ("The crossover is between 25 % and 150 %: flexgen is the fastest below it, llama_cpp above.")


def test_a_table_shows_batch_repetitions_and_failures() -> None:
    shown = text(
        rung(0.25, "flexgen", [20.0]), rung(0.25, "accelerate", []), rung(1.5, "flexgen", [40.0, 42.0], batch_size=8)
    )
    assert "| 16-bit weights, tok/s | 25 % (512.00 MiB) | 150 % (3.00 GiB) |" in shown
    assert "| flexgen | **20.0** (batch 2; n=1) | **41.0** (batch 8; 40.0 to 42.0, n=2) |" in shown
    assert "| accelerate | OOM | - |" in shown
    assert "- accelerate at 25 %: OOM: killed for memory" in shown
    assert "- At 25 % no system that was tried runs but flexgen." in shown
    assert "- At 150 % nothing is compared: only flexgen was tried, or only others." in shown
    assert "Nothing is added for the process itself." in shown


def test_compressed_weights_compete_among_themselves_on_the_same_rung() -> None:
    """The share is of the 16-bit weights in both tables, so that the two stand above each other."""
    four, eight = Lossy(weights=Compression(4)), Lossy(weights=Compression(4), activations=8)
    [ladder] = ladders(
        rung(0.5, "flexgen", [20.0]),
        rung(0.5, "llama_cpp", [10.0]),
        rung(0.5, "flexgen", [50.0], four),
        rung(0.5, "flexgen", [70.0], eight),
        rung(0.5, "llama_cpp", [35.0], four),
    )
    assert ladder.widths == [16, 4]
    assert ladder.weight_bytes == WEIGHTS
    assert [round(v.ratio or 0, 2) for bits in ladder.widths for v in verdicts(ladder, bits)] == [2.0, 2.0]
    [best] = verdicts(ladder, 4)
    assert best.ours is not None
    assert "8-bit activations" in best.ours.label


def test_a_system_that_does_not_run_is_told_whoever_it_is() -> None:
    shown = text(
        rung(0.25, "flexgen", []), rung(0.25, "llama_cpp", [3.0]), rung(0.5, "flexgen", []), rung(0.5, "llama_cpp", [])
    )
    assert "- At 25 % flexgen does not run, and others do." in shown
    assert "- At 50 % nothing that was tried runs." in shown


def test_a_system_that_is_not_installed_is_no_slower_one() -> None:
    absent = rung(0.5, "llama_cpp", [], status=Status.UNAVAILABLE, reason="xllamacpp is not installed")
    shown = text(rung(0.5, "flexgen", [20.0]), absent)
    assert "- At 50 % nothing is compared" in shown
    assert "llama\\_cpp at 50 %: unavailable: xllamacpp is not installed" in shown


def test_a_cap_that_did_not_hold_is_told() -> None:
    loose = rung(0.5, "flexgen", [20.0], memory_cap={"requested_bytes": WEIGHTS // 2, "enforced": False})
    assert "- The cap was not enforced: flexgen at 50 %." in text(loose)


def test_the_process_itself_is_told() -> None:
    process = {"base_bytes": 256 * 2**20}
    record = rung(0.5, "flexgen", [20.0], environment=ENVIRONMENT | {"process": process})
    assert "before anything of the model is loaded: flexgen 256.00 MiB." in text(record)


def test_records_with_a_cap_in_bytes_stand_on_no_ladder(tmp_path: Path) -> None:
    rows = build_rows([StoredRecord(tmp_path / "default" / "a.json", make_record())])
    assert measured_ladders(rows) == []
    assert "Ladder" not in suite_page("default", rows, [], tmp_path)
    on = build_rows([StoredRecord(tmp_path / "ladder" / "a.json", rung(0.5, "flexgen", [20.0]))])
    assert "## Ladder" in suite_page("ladder", on, [], tmp_path)


def test_machines_do_not_share_a_ladder() -> None:
    other = rung(1.5, "flexgen", [20.0], environment=ENVIRONMENT | {"cpu": {"model": "Other", "usable_cores": 8}})
    assert len(ladders(rung(0.5, "flexgen", [20.0]), other)) == 2


def test_predicted_ladders_of_the_gpu_and_of_the_host() -> None:
    page = predicted_page(
        [
            predicted("flexgen", {"gpu": 0.25}, 100.0),
            predicted("accelerate", {"gpu": 0.25}, 10.0),
            predicted("flexgen", {"gpu": 0.5, "cpu": 0.5}, 60.0),
            predicted("transformers", {"gpu": 0.5, "cpu": 0.5}, None),
        ]
    )
    assert "GPU memory at shares of the weights (2.00 GiB uncompressed):" in page
    assert "Host memory at shares of the weights (2.00 GiB uncompressed), GPU memory at 50 % of them:" in page
    assert "| flexgen | **100 (S)** (batch 4) |" in page
    assert "| ratio to the best other | 10.0x accelerate |" in page
    assert "- transformers at 50 %: OOM: no room" in page
    assert "(S) = SIMULATED." in page


def predicted(system: str, shares: dict[str, float], rate: float | None) -> Simulated:
    sizes = {f"{tier}_memory_bytes": int(share * WEIGHTS) for tier, share in shares.items()}
    hardware = HardwareProfile("t4", Accelerator.CUDA, disk_bytes=10**12, weight_shares=shares, **sizes)  # type: ignore[arg-type]
    spec = replace(make_spec(system), hardware=hardware)
    job = Job(spec.model.shape, spec.dtype, hardware, 8, 4, 4)
    model = SystemModel(predictor="module:Class")
    if rate is None:
        return Simulated(spec, job, model, Status.OOM, "no room\nat all")
    return Simulated(spec, job, model, Status.OK, prediction=Prediction(0.0, 16 / rate, 4, 8, 4, 4))
