"""How fast the disk is read and written around the page cache, by request size and requests in flight.

``python benchmarks/direct_io.py [--dir FOLDER] [--size 1GiB] [--out results/benchmarks/direct_io.json]``

Rounds are interleaved, so that a disk that slows down does so for every setting. What is learnt from it is in
docs/notes/disk.md: CHUNK_BYTES and IN_FLIGHT of memory/direct_file.py, DISK_SEGMENT_BYTES of planner/memory_plan.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from flexgen_bench.core.parsing import parse_bytes
from flexgen_bench.core.units import GB, KIB, MIB
from flexgen_bench.memory import direct_file
from flexgen_bench.memory.direct_file import DirectFile
from flexgen_bench.memory.host import allocate

READS = [(chunk, flight) for chunk in (MIB, 4 * MIB, 16 * MIB) for flight in (1, 2, 4, 8)]
WRITES = [4 * KIB, 16 * KIB, 64 * KIB, 128 * KIB, 512 * KIB, 4 * MIB]
ROUNDS = 3


def read_rate(path: Path, size: int, chunk: int, flight: int) -> float:
    """bytes/s of reading the file in transfers of 64 MiB, each cut into chunks."""
    direct_file.CHUNK_BYTES, direct_file.IN_FLIGHT = chunk, flight
    file, buffer = DirectFile(path), allocate(64 * MIB)
    start = time.perf_counter()
    for offset in range(0, size, 64 * MIB):
        file.read(offset, buffer)
    seconds = time.perf_counter() - start
    file.close()
    return size / seconds


def write_rate(path: Path, request: int) -> float:
    """bytes/s of single writes of this size, one after the other."""
    file, buffer = DirectFile(path, os.O_RDWR), allocate(request)
    count = max(16, min(512, 256 * MIB // request))
    start = time.perf_counter()
    for number in range(count):
        file.write(number * request, buffer[:request])
    seconds = time.perf_counter() - start
    file.close()
    return count * request / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path.home() / ".cache")
    parser.add_argument("--size", default="1GiB")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size = parse_bytes(options.size) // (64 * MIB) * 64 * MIB
    reads: dict[tuple[int, int], list[float]] = {setting: [] for setting in READS}
    writes: dict[int, list[float]] = {request: [] for request in WRITES}
    with tempfile.NamedTemporaryFile(dir=options.dir) as handle:
        path = Path(handle.name)
        block = os.urandom(16 * MIB)
        for _ in range(size // len(block)):
            handle.write(block)
        os.fsync(handle.fileno())
        for _ in range(ROUNDS):
            for setting in READS:
                reads[setting].append(read_rate(path, size, *setting))
        for _ in range(ROUNDS):
            for request in WRITES:
                writes[request].append(write_rate(path, request))
    rows: list[dict[str, Any]] = [
        {"what": "read", "chunk_bytes": c, "in_flight": f, "bytes_per_s": rates} for (c, f), rates in reads.items()
    ]
    rows += [{"what": "write", "chunk_bytes": r, "in_flight": 1, "bytes_per_s": v} for r, v in writes.items()]
    for row in rows:
        rates = row["bytes_per_s"]
        print(
            f"{row['what']:5} {row['chunk_bytes'] // KIB:6} KiB  in flight {row['in_flight']}: "
            f"{statistics.median(rates) / GB:.2f} GB/s ({min(rates) / GB:.2f}-{max(rates) / GB:.2f})"
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"evidence": "MEASURED", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
