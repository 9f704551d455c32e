"""Results folders for tests of the page: several systems and machines, failures, compression, a trace, broken files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.record import LinkUse, Record, SystemReport
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.core.timeline import ROW, LaneTimeline, Timeline
from flexgen_bench.store.trace import Trace, encode_trace, write_trace
from flexgen_bench.store.writer import write_record
from tests.support.record_factory import ENVIRONMENT, SHAPE, make_record, make_spec

HOSTILE = "<script>window.hurt=1</script><img src=x onerror='window.hurt=2'>' \\ \u2028</script>"
ENGINE_POLICY = {
    "gpu_batch_size": 4,
    "num_gpu_batches": 1,
    "weights": {"gpu": 0.0, "cpu": 0.25, "disk": 0.75},
    "kv_cache": {"gpu": 0.0, "cpu": 1.0, "disk": 0.0},
    "activations": {"gpu": 0.0, "cpu": 1.0, "disk": 0.0},
}


def write_results(folder: Path) -> list[Record]:
    """Seven records in one suite, one of them hostile; the older of two runs of one cell among them."""
    report = SystemReport(
        requested=ENGINE_POLICY,
        realised={"weights": {"cpu": 0.2, "disk": 0.8}, "bytes": {"cpu": {"weights": 10, "kv_cache": 20}}},
        planned_bytes={"cpu": 2**30},
        peak_bytes={"cpu": 2**30},
        links={"disk_read": LinkUse(6 * 2**30, 4.0)},
        lane_busy_s={"cpu": 14.0, "disk_read": 4.0},
        lowest_tier="disk",
        notes=("reads go through the page cache",),
    )
    prediction = {"status": "ok", "tok_per_s": 3.9, "bottleneck": "cpu: busy 90% of the job", "evidence": "SIMULATED"}
    engine = make_record("flexgen", run=2, report=report, prediction=prediction)
    trace = encode_trace(Trace(engine.spec_hash, Evidence.MEASURED, _timeline()))
    engine = replace(engine, trace=write_trace(engine, trace, folder))
    lossy = Lossy(weights=Compression(4))
    other = {"cpu": {"model": "Other CPU", "usable_cores": 8}, "gpus": []}
    shape = ModelShape(HOSTILE, *list(to_json(SHAPE).values())[1:11])
    hostile_spec = replace(make_spec("flexgen"), model=replace(make_spec("flexgen").model, shape=shape))
    records = [
        make_record("flexgen", run=1, times=((2.0, 6.0),)),
        engine,
        make_record("accelerate", run=3, times=((1.0, 9.0), (1.0, 9.5))),
        make_record("deepspeed", run=4, status=Status.OOM, reason="keeps all weights in memory", samples=()),
        make_record("flexgen", run=5, spec=make_spec("flexgen", lossy=lossy), times=((1.0, 1.0),)),
        make_record("transformers", run=6, environment=ENVIRONMENT | other, evidence=Evidence.EMULATED),
        make_record("flexgen", run=7, spec=hostile_spec, report=SystemReport(notes=(HOSTILE,)), rerun_command=HOSTILE),
    ]
    for record in records:
        write_record(record, folder)
    return records


def break_files(folder: Path, how_many: int = 1) -> None:
    """Files that lie where records lie: cut short, of a later schema, of no schema, and no JSON at all."""
    suite = folder / "default"
    whole = next(p for p in sorted(suite.glob("*.json")))
    data: dict[str, Any] = json.loads(whole.read_text(encoding="utf-8"))
    for number in range(how_many):
        (suite / f"cut-{number}.json").write_text(whole.read_text(encoding="utf-8")[:500], encoding="utf-8")
        (suite / f"later-{number}.json").write_text(json.dumps(data | {"schema_version": 99}), encoding="utf-8")
        (suite / f"other-{number}.json").write_text('["not", "a", "record"]', encoding="utf-8")
        (suite / f"bytes-{number}.json").write_bytes(b"\xff\xfe\x00")


def _timeline() -> Timeline:
    """Two lanes, a prefill and two decode passes of two layers: 0 is the embedding, 3 the head."""
    kinds = ("embed", "layer", "load_weights")
    compute, load = bytearray(), bytearray()
    for token in range(3):
        for unit in range(4):
            at = 0.4 * token + 0.1 * unit
            compute += ROW.pack(0 if unit == 0 else 1, unit, 0, -1, token, at, at + 0.08, 0, 1000)
            load += ROW.pack(2, unit, -1, -1, token, at, at + 0.05, 1 << 20, 0)
    return Timeline({"cpu": LaneTimeline(compute, kinds), "disk_read": LaneTimeline(load, kinds)})
