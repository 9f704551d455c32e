"""What a batch of a million lines keeps in memory besides its model and the window in flight: reading the input,
finding the order, reading lines in that order, writing answers, and finding them again in the file of a killed run.

    python benchmarks/batch_memory.py --lines 1000000

Nothing is computed: answers are made up. Each step's peak is that of the process so far, above what its imports take.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from flexgen_bench.batch.output_file import OutputFile
from flexgen_bench.batch.scan import in_order, scan
from flexgen_bench.core.shard import Shard

Made = TypeVar("Made")


def peak() -> int:
    """Bytes; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Steps:
    def __init__(self) -> None:
        self._before = peak()

    def run(self, name: str, work: Callable[[], Made]) -> Made:
        begin = time.process_time()
        made = work()
        above = (peak() - self._before) / 2**20
        print(f"{name:<28} {above:8.0f} MiB {time.process_time() - begin:8.1f} CPU s", flush=True)
        return made


def write_input(path: Path, lines: int) -> None:
    with path.open("w") as file:
        for n in range(lines):
            body = {"model": "m", "prompt": f"Question {n}: " + "word " * (20 + n % 50), "max_tokens": 1 + n * 7 % 256}
            line = {"custom_id": f"request-{n}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        write_input(source, options.lines)
        print(f"{options.lines} lines, {source.stat().st_size / 2**20:.0f} MiB")
        steps = Steps()
        scanned = steps.run("scan", lambda: scan([source], None, Shard()))
        rows = steps.run("order", scanned.order)
        job = {"inputs": [sha for _, sha in scanned.files]}
        answer = {"response": {"status_code": 200, "body": {"choices": [{"text": "word " * 20}]}}, "error": None}

        def write() -> None:
            with OutputFile(out, job, scanned.positions) as output:
                for line in in_order(rows, [source], None):
                    output.write(line.position, f"request-{line.position}", answer)

        def find_again() -> None:
            with OutputFile(out, job, scanned.positions) as output:
                assert output.done == options.lines
                output.restore_order()

        steps.run("read in order, write answers", write)
        steps.run("find again, restore order", find_again)
        print(f"{out.stat().st_size / 2**20:.0f} MiB of answers")


if __name__ == "__main__":
    main()
