"""Our engine next to Accelerate and DeepSpeed, all streaming from disk under one memory cap below the weights' size.

``python benchmarks/capped_disk.py [--quick] [--out results/benchmarks/capped_disk.json]``

Runs ``suite=capped`` (conf/suite/capped.yaml: every system at the best of the same batch sizes, the cap enforced by a
control group, page cache included) and reads the records it leaves in results/capped. Judged is generated tokens/s over
those of the better baseline, for 16-bit and for 4-bit weights. --quick runs a small model without cap.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from common import Bar, Options, Report, median, options

from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.core.record import Record
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.store.reader import read_record

SUITE = "capped"
BARS = {"16-bit": 2.0, "4-bit": 4.0}
# --rounds are repetitions of every cell.
QUICK = [
    "model=opt-125m",
    "workload.num_prompts=4",
    "workload.gen_len=4",
    "gpu.cpu_memory=null",
    "measure.batch_sizes=[4]",
]


def main() -> int:
    opts = options(__doc__)
    with tempfile.TemporaryDirectory() as scratch:  # quick runs leave no records
        records = _run(opts, Path(scratch) if opts.quick else Path("results"))
    report = Report("capped_disk", Evidence.MEASURED, opts)
    ours: dict[str, Record] = {}
    baselines: dict[str, Record] = {}
    for path, record in records.items():
        bits = "16-bit" if record.spec.get("lossy") is None else "4-bit"
        if record.spec["system"] == "flexgen":
            ours[bits] = record
        else:
            baselines[str(record.spec["system"])] = record
        report.rounds.append(
            {"record": str(path), "system": record.spec["system"], "weights": bits}
            | {"status": record.status, "reason": record.reason, "batch_size": record.batch_size}
            | {"tok_per_s": _rates(record), "memory_cap": dict(record.memory_cap)}
        )
        report.where_time_goes.append(_line(f"{record.spec['system']}, {bits}", record))
    rated = {name: median(_rates(r)) for name, r in baselines.items() if r.status is Status.OK}
    if rated:
        best = max(rated, key=lambda name: rated[name])
        for bits, record in ours.items():
            if record.status is Status.OK:
                report.bars.append(
                    Bar(
                        f"{bits} weights",
                        f"{rated[best]:.2f} tok/s ({best})",
                        f"{median(_rates(record)):.2f} tok/s",
                        tuple(rate / rated[best] for rate in _rates(record)),
                        BARS[bits],
                        at_most=False,
                    )
                )
    return report.finish()


def _run(opts: Options, results: Path) -> Mapping[Path, Record]:
    """Measure every cell of the suite anew; the last line that is printed names the records."""
    command = [sys.executable, "-m", "flexgen_bench", f"suite={SUITE}", "rerun=true"]
    command += [f"results_dir={results}", f"threads={opts.threads}"]
    if opts.cache != default_cache_dir():
        command.append(f"cache_dir={opts.cache}")
    command += [f"measure.repetitions={opts.rounds}", *(QUICK if opts.quick else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="")
    if not done.stdout.strip():
        sys.exit(f"{' '.join(command)} ended with status {done.returncode} and no records")
    paths = [Path(path) for path in json.loads(done.stdout.splitlines()[-1])["records"]]
    return {path: read_record(path) for path in paths}


def _rates(record: Record) -> tuple[float, ...]:
    """Generated tokens/s of each repetition."""
    return tuple(sample.generated_tokens / sample.total_s for sample in record.samples)


def _line(name: str, record: Record) -> str:
    if record.status is not Status.OK:
        return f"{name}: {record.status}: {record.reason.splitlines()[0] if record.reason else ''}"
    prefill = median([sample.prefill_s for sample in record.samples])
    decode = median([sample.decode_s for sample in record.samples])
    busy = ", ".join(f"{lane} {seconds:.0f} s" for lane, seconds in record.report.lane_busy_s.items() if seconds)
    lanes = f"; busy, all repetitions: {busy}" if busy else ""
    enforced = "" if record.memory_cap.get("enforced") else " WITHOUT its cap"
    return f"{name}: batch {record.batch_size}{enforced}, prefill {prefill:.1f} s, decode {decode:.1f} s{lanes}"


if __name__ == "__main__":
    sys.exit(main())
