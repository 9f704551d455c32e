"""How fast weights stream from disk in a run that waits for the disk, next to plain reads of the same file.

``python benchmarks/disk_stream.py [--quick] [--out results/benchmarks/disk_stream.json]``

All weights on disk, two sequences, so that computing a unit takes a fraction of reading it; without accelerator, and
with an emulated one whose links are not felt. Judged is bytes read / wall time of the decode passes. The reference is
the faster of two plain direct reads of the packed file from end to end: one request of 16 MiB after the other, and four
of 4 MiB in flight all the time, into memory as large as the processor's caches are not, as weights must be. Every run
stands between two reads of each kind, whose mean counts. The first pass verifies checksums and is shown apart.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from common import Bar, Options, Report, median, options
from engine_runs import HOST, Measured, Shape, dummy_weights, emulated, engine, lane_lines, run

from flexgen_bench.core.hardware import HardwareProfile
from flexgen_bench.core.policy import Placement, Policy
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.tiers import Lane, Tier
from flexgen_bench.core.units import GB, MIB
from flexgen_bench.engine.build import PackedWeights
from flexgen_bench.memory.host import allocate

LIMIT = 0.90
JOB = Shape(prompts=2, prompt_len=8, gen_len=5)
# What the plain readers fill over and over. Reads into a buffer that stays in the processor's cache are up to a
# third faster on a virtual disk, whose host copies the data.
REGION_BYTES = 256 * MIB
REFERENCE_READS = {"16 MiB, one by one": (16 * MIB, 1), "4 MiB, four in flight": (4 * MIB, 4)}


def reference_read(path: Path, region: memoryview, chunk: int, in_flight: int) -> float:
    """bytes/s of reading a file around the page cache from end to end; independent of the project's own reader."""
    size = path.stat().st_size // chunk * chunk
    handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    offsets, lock = iter(range(0, size, chunk)), threading.Lock()

    def read() -> None:
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            place = offset % len(region)
            view = region[place : place + chunk]
            done = 0
            while done < chunk:
                done += os.preadv(handle, [view[done:]], offset + done)

    threads = [threading.Thread(target=read) for _ in range(in_flight)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    os.close(handle)
    return size / seconds


def main() -> int:
    opts = options(__doc__, rounds=5)
    weights = dummy_weights(opts)
    machines = {"cpu": HOST, "emulated": emulated()}
    region = allocate(REGION_BYTES)
    region.fill_(1)  # pages that are there, as those of the staging buffers are
    readers = region.numpy().data
    runs: dict[str, list[Measured]] = {name: [] for name in machines}
    reference: dict[str, list[dict[str, float]]] = {name: [] for name in machines}
    for _ in range(opts.rounds):
        before = _reference(weights.store.path, readers)
        for name, hardware in machines.items():
            runs[name].append(_stream(weights, hardware, opts))
            after = _reference(weights.store.path, readers)
            reference[name].append({kind: (before[kind] + after[kind]) / 2 for kind in REFERENCE_READS})
            before = after
    report = Report("disk_stream", Evidence.MEASURED, opts)
    report.settings = {"job": vars(JOB), "plain_bytes_per_s": reference}
    for name, measured in runs.items():
        references = [max(speeds.values()) for speeds in reference[name]]
        rates = [_rate(m) for m in measured]
        report.rounds += [{"machine": name, "bytes_per_s": _rate(m)} | m.to_dict() for m in measured]
        report.bars.append(
            Bar(
                f"weights on disk, {name}",
                f"{median(references) / GB:.3f} GB/s",
                f"{median(rates) / GB:.3f} GB/s",
                tuple(r / p for r, p in zip(rates, references, strict=True)),
                LIMIT,
                at_most=False,
            )
        )
        first = median([m.prefill_s for m in measured])
        report.where_time_goes.append(
            f"{name}: first pass, with checksums: {first:.2f} s; later ones "
            f"{median([s for m in measured for s in m.pass_s]):.2f} s"
        )
        if not report.bars[-1].met:
            report.where_time_goes += lane_lines(measured[-1], f"{name}, last round")
    return report.finish()


def _stream(weights: PackedWeights, hardware: HardwareProfile, opts: Options) -> Measured:
    disk = Placement.all_on(Tier.DISK)
    near = Placement.all_on(hardware.compute_tier)
    with engine(weights, Policy(2, 1, disk, near, near), hardware, opts) as made:
        return run(made, JOB)


def _reference(path: Path, region: memoryview) -> dict[str, float]:
    return {kind: reference_read(path, region, *how) for kind, how in REFERENCE_READS.items()}


def _rate(measured: Measured) -> float:
    """bytes/s from the disk in the decode passes, over wall time."""
    streamed = sum(unit.load_bytes for unit in measured.plan.job.streamed)
    assert measured.bytes(Lane.DISK_READ) >= streamed * (len(measured.pass_s) + 1)
    return streamed * len(measured.pass_s) / sum(measured.pass_s)


if __name__ == "__main__":
    sys.exit(main())
