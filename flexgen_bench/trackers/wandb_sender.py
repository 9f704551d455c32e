"""The process that talks to wandb: ``python -m flexgen_bench.trackers.wandb_sender`` with an order on stdin.

It reads the records back from disk, so what is sent is what was saved. On failure its last line on standard
error says what went wrong; the exit status is 1, or 3 if the run was written offline instead of sent.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexgen_bench.core.metrics import metrics, summaries
from flexgen_bench.core.record import Record
from flexgen_bench.report.rows import build_rows
from flexgen_bench.report.same_tokens import lossy_of
from flexgen_bench.report.table import csv_values
from flexgen_bench.store.reader import StoredRecord, read_record
from flexgen_bench.store.schema import encode
from flexgen_bench.store.writer import suite_folder

# What fills the record's own place in the run (spec, measurements) is left out of the run's configuration.
_NOT_CONFIG = ("samples", "warmup_samples", "outputs")


def main() -> int:
    """Carry out one order."""
    order = json.load(sys.stdin)
    options: Mapping[str, Any] = order["options"]
    stored = [StoredRecord(Path(p), read_record(Path(p))) for p in order["paths"]]
    try:
        import wandb
    except ImportError as error:
        print(f"wandb cannot be imported ({error}); pip install wandb", file=sys.stderr)
        return 1
    try:
        if order["what"] == "record":
            trouble = _send_record(wandb, stored[0], options)
        else:
            trouble = _send_suite(wandb, order["suite"], stored, options)
    except Exception as error:  # whatever wandb raises: it is reported, and the record is safe
        print(_one_line(error), file=sys.stderr)
        return 1
    if trouble:
        print(f"online: {trouble}; written offline instead", file=sys.stderr)
        return 3
    return 0


def run_config(record: Record) -> dict[str, Any]:
    """The run's configuration: the resolved spec, and everything else a record tells about the circumstances."""
    data = encode(record)
    spec = data["spec"]
    lossy = str(lossy_of(record))
    named = {"system": spec.get("system"), "dtype": spec.get("dtype"), "lossy": lossy}
    for part, inner in (("model", spec.get("model", {}).get("shape", {})), ("workload", spec.get("workload", {}))):
        named[part] = inner.get("name")
    return named | {k: v for k, v in data.items() if k not in _NOT_CONFIG}


def run_history(record: Record) -> list[dict[str, float]]:
    """One row per repetition: its raw figures and every metric of it, so that the spread can be seen."""
    values = metrics(record)
    rows = []
    for index, sample in enumerate(encode(record)["samples"]):
        row: dict[str, float] = {"repetition": index, **{f"sample/{k}": v for k, v in sample.items()}}
        rows.append(row | {f"metric/{name}": m.samples[index] for name, m in values.items()})
    return rows


def run_summary(record: Record) -> dict[str, Any]:
    """Pooled metrics with spread, unit and evidence; memory and link figures."""
    summary: dict[str, Any] = {"status": record.status.value, "evidence": record.evidence.value}
    for name, one in summaries(record).items():
        summary[f"metric/{name}"] = {
            "value": one.value,
            "low": one.low,
            "high": one.high,
            "interval": one.interval.value,
            "n": one.n,
            "unit": one.unit,
            "higher_is_better": one.higher_is_better,
            "evidence": one.evidence.value,
        }
    for tier, peak in record.report.peak_bytes.items():
        summary[f"peak_bytes/{tier}"] = peak
    for lane, use in record.report.links.items():
        summary[f"link/{lane}_bytes"], summary[f"link/{lane}_s"] = use.bytes, use.seconds
    return summary


def _send_record(wandb: Any, stored: StoredRecord, options: Mapping[str, Any]) -> str:
    """Returns why the run went to files instead of the server, empty if it is where it should be."""
    record = stored.record
    config = run_config(record)
    name = f"{config['system']} {config['model']} {config['workload']}"
    tags = [record.status.value, record.evidence.value, str(config["system"])]
    if not lossy_of(record).is_exact:
        name, tags = f"{name} ({config['lossy']})", [*tags, str(config["lossy"])]
    run, trouble = _start(wandb, options, name=name, suite=record.suite, job_type="cell", config=config, tags=tags)
    run.define_metric("repetition")
    run.define_metric("*", step_metric="repetition")
    for row in run_history(record):
        run.log(row)
    run.summary.update(run_summary(record))
    run.finish()
    return trouble


def _send_suite(wandb: Any, suite: str, stored: list[StoredRecord], options: Mapping[str, Any]) -> str:
    """One run with the suite's table. Returns as ``_send_record``."""
    rows = [dict(csv_values(row, stored[0].path.parent)) for row in build_rows(stored)]
    config = {"suite": suite, "spec_hashes": [s.record.spec_hash for s in stored]}
    run, trouble = _start(
        wandb,
        options,
        name=f"table {suite_folder(suite)}",
        suite=suite,
        job_type="table",
        config=config,
        tags=["table"],
    )
    table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    run.log({"table": table})
    run.finish()
    return trouble


def _start(
    wandb: Any,
    options: Mapping[str, Any],
    *,
    name: str,
    suite: str,
    job_type: str,
    config: dict[str, Any],
    tags: list[str],
) -> tuple[Any, str]:
    """A started run. Online falls back to files: what cannot be sent now can be synced later."""
    arguments = {
        "project": options["project"],
        "entity": options["entity"] or None,
        "name": name,
        "group": suite_folder(suite),
        "job_type": job_type,
        "config": config,
        "tags": tags,
        # A part of the time only: the rest is for writing, and for offline where online fails.
        "settings": wandb.Settings(
            init_timeout=max(1.0, options["timeout_s"] / 4), x_disable_stats=True, disable_git=True
        ),
    }
    try:
        return wandb.init(mode=options["mode"], **arguments), ""
    except Exception as error:
        if options["mode"] == "offline":
            raise
        return wandb.init(mode="offline", **arguments), _one_line(error)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    sys.exit(main())
