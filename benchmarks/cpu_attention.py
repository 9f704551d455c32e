"""Decode attention on the processor: bytes of KV cache per second, next to the rate at which the same memory can be
read.

``python benchmarks/cpu_attention.py [--threads 1 2] [--rounds 5] [--only NAME ...]
[--out results/benchmarks/cpu_attention.json]``

Every call reads another layer's cache, and all layers together are more than caches hold, so all bytes come from
memory. A round is a number of turns of: a read loop (another one each turn), the native kernel, torch's operators,
about as many bytes each. What counts is each one's fastest turn of the round, because on a machine with other work most
turns are disturbed; the ratio of a round is a path's rate over the read loops'. What follows from it is in
docs/notes/cpu_attention.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexgen_bench.core.compression import Compression
from flexgen_bench.core.instructions import NATIVE_SWITCH
from flexgen_bench.core.units import GB, MIB
from flexgen_bench.kernels.attention import PackedSegment, PlainSegment, Segment, decode_attention
from flexgen_bench.kernels.decode import attend_with_torch
from flexgen_bench.kernels.native.build import library
from flexgen_bench.kernels.quantization import quantize
from flexgen_bench.machine.environment import cpu_model

ALL_BYTES = 512 * MIB  # of all layers' caches, and of the buffer of the read loops
TURN_BYTES = 64 * MIB  # at least; a few milliseconds, in which a thread may well be left alone
TURNS = 24
# (streams, bytes prefetched ahead) of the read loops: which one is fastest differs between machines and numbers of
# threads.
READ_LOOPS = [(1, 4096), (4, 1024), (8, 0)]
BARS = {"torch": 0.45, "native": 0.70}  # of the read rate, for the case named BAR_CASE on all threads
BAR_CASE = "8 x 56 heads, 528 tokens, bf16"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """A cache's shape and type (a key of DTYPES or bits of a code)."""

    sequences: int
    heads: int
    kv_heads: int
    tokens: int
    kind: str
    value_share: float = 1.0
    dim: int = 128

    @property
    def name(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads != self.heads else f"{self.heads}"
        kind = self.kind if self.kind in DTYPES else f"{self.kind} bits"
        sparse = f", {self.value_share:.0%} of V" if self.value_share < 1 else ""
        return f"{self.sequences} x {heads} heads, {self.tokens} tokens, {kind}{sparse}"


CASES = [
    *(Case(8, 56, 56, 528, kind) for kind in ("bf16", "fp16", "fp32", "8", "4", "3")),
    *(Case(8, 64, 8, 4096, kind) for kind in ("bf16", "fp16", "fp32", "8", "4")),
    Case(1, 56, 56, 528, "bf16"),
    Case(1, 64, 8, 4096, "bf16"),
    Case(8, 56, 56, 528, "bf16", 0.1),
]


class Layers:
    """Caches of as many layers as make ALL_BYTES, and a query."""

    def __init__(self, case: Case) -> None:
        self.case = case
        fresh = torch.randn(2, case.sequences, case.kv_heads, case.tokens, case.dim)
        self.q = torch.randn(case.sequences, case.heads, case.dim)
        self.segments: list[Segment] = []
        if case.kind in DTYPES:
            parts: tuple[Tensor, ...] = (fresh.to(DTYPES[case.kind]),)
            self.q = self.q.to(DTYPES[case.kind])
        else:
            compression = Compression(int(case.kind))
            parts = quantize(fresh, compression)
            self.q = self.q.to(torch.bfloat16)
        self.layer_bytes = sum(part.nbytes for part in parts)
        for _ in range(-(-ALL_BYTES // self.layer_bytes)):
            copy = [part.clone() for part in parts]
            if case.kind in DTYPES:
                self.segments.append(PlainSegment(copy[0][0], copy[0][1]))
            else:
                self.segments.append(PackedSegment(copy[0], copy[1], compression, case.dim))

    def rate(self, attend: Callable[..., Tensor], turn: int) -> float:
        """bytes of cache per second of attention over as many layers as make TURN_BYTES, others every turn."""
        count = max(1, TURN_BYTES // self.layer_bytes)
        chosen = [self.segments[(turn * count + i) % len(self.segments)] for i in range(count)]
        start = time.perf_counter()
        for segment in chosen:
            attend(self.q, [segment], None, self.case.dim**-0.5, self.case.value_share)
        return count * self.layer_bytes / (time.perf_counter() - start)


def read_rate(buffer: Tensor, turn: int) -> float:
    """bytes/s of a read loop over torch's number of threads."""
    part = buffer.split(TURN_BYTES)[turn % (ALL_BYTES // TURN_BYTES)]
    return read_all(part, *READ_LOOPS[turn % len(READ_LOOPS)])


def read_all(buffer: Tensor, streams: int, ahead: int) -> float:
    """bytes/s of reading a buffer of whole MiB once, on as many threads as torch has."""
    native = library("bandwidth")
    assert native is not None, "this benchmark needs a C++ compiler"
    native.read_bytes.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 4]
    begin = time.perf_counter()
    native.read_bytes(buffer.data_ptr(), buffer.numel(), streams, ahead, torch.get_num_threads())
    return buffer.numel() / (time.perf_counter() - begin)


def with_torch(*args: Any) -> Tensor:
    """Nothing native in it, dequantization included."""
    os.environ[NATIVE_SWITCH] = "0"
    try:
        return attend_with_torch(*args)
    finally:
        del os.environ[NATIVE_SWITCH]


def measure(case: Case, rounds: int, buffer: Tensor) -> dict[str, Any]:
    layers = Layers(case)
    paths: dict[str, Callable[..., Tensor]] = {"native": decode_attention, "torch": with_torch}
    # Unpacking with torch takes a second for what the kernel reads in milliseconds: once a round is enough.
    turns = {"native": TURNS, "torch": TURNS if case.kind in DTYPES else 1}
    for attend in paths.values():
        layers.rate(attend, 0)
    reads: list[float] = []
    rates: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(rounds):
        samples: dict[str, list[float]] = {name: [] for name in ("read", *paths)}
        for turn in range(number * TURNS, (number + 1) * TURNS):
            samples["read"].append(read_rate(buffer, turn))
            for name, attend in paths.items():
                if len(samples[name]) < turns[name]:
                    samples[name].append(layers.rate(attend, turn))
        reads.append(max(samples["read"]))
        for name in paths:
            rates[name].append(max(samples[name]))
    return {
        "case": case.name,
        "threads": torch.get_num_threads(),
        "layer_bytes": layers.layer_bytes,
        "read_bytes_per_s": reads,
        **{f"{name}_bytes_per_s": values for name, values in rates.items()},
        **{f"{name}_ratio": [a / b for a, b in zip(values, reads, strict=True)] for name, values in rates.items()},
    }


def shown(row: dict[str, Any]) -> str:
    """One line of the table."""
    parts = [f"{row['threads']}  {row['case']:42}"]
    parts.append(f"read {statistics.median(row['read_bytes_per_s']) / GB:5.1f} GB/s")
    for name in BARS:
        ratios, rates = row[f"{name}_ratio"], row[f"{name}_bytes_per_s"]
        parts.append(
            f"{name} {statistics.median(rates) / GB:5.1f} GB/s, ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f})"
        )
    return "  ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of names of cases")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    buffer = torch.ones(ALL_BYTES, dtype=torch.uint8)
    rows = []
    for case in CASES:
        if not any(part in case.name for part in options.only):
            continue
        for threads in dict.fromkeys(options.threads):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                rows.append(measure(case, options.rounds, buffer))
            print(shown(rows[-1]), flush=True)
    for row in rows:
        if row["case"] == BAR_CASE and row["threads"] == max(options.threads):
            for name, bar in BARS.items():
                ratio = statistics.median(row[f"{name}_ratio"])
                print(f"{name}: {ratio:.2f} of the read rate, wanted {bar:.2f}")
    if options.out:
        machine = {
            "cpu": cpu_model(),
            "logical_cores": os.cpu_count(),
            "torch": torch.__version__,
            "load_average": os.getloadavg(),
        }
        report = {"evidence": "MEASURED", "machine": machine, "bars": BARS, "bar_case": BAR_CASE}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
