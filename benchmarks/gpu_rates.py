"""How fast a GPU and its host are at what offloading needs: links, matrix products, attention, disk.

``python benchmarks/gpu_rates.py [--device cuda] [--dir FOLDER] [--out results/benchmarks/gpu_rates.json]``

Sections stand for themselves: one that fails is noted with its error, and the file is written after each. Every figure
is the median of ROUNDS rounds, with the slowest and the fastest. ``--device cpu --quick`` tries the script out without
a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F

from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.core.compression import Compression
from flexgen_bench.core.units import GB, GIB, KIB, MIB
from flexgen_bench.kernels.attention import PlainSegment, decode_attention
from flexgen_bench.kernels.fused_product import is_fused
from flexgen_bench.kernels.narrow_linear import tiled_linear
from flexgen_bench.kernels.ops import linear
from flexgen_bench.kernels.quantization import QuantizedWeight
from flexgen_bench.memory.direct_file import DirectFile
from flexgen_bench.memory.host import allocate

ROUNDS = 5
SIZES = (64 * KIB, MIB, 16 * MIB, 256 * MIB, GIB)
ROWS = (1, 4, 16, 48, 64, 128, 512, 4096, 16384)  # decode rows of small and large micro-batches; prefill
PACKED_ROWS = (1, 2, 4, 8, 16)  # as many as are multiplied with a packed weight as it lies
WIDTHS = (7168, 28672)  # OPT-30B's feed-forward matrix
HEADS, HEAD_DIM, TOKENS = 56, 128, 528
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where and how large. ``quick``: small enough to try the script on a processor."""

    device: torch.device
    folder: Path
    quick: bool

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def settle(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any], least_s: float = 0.05) -> list[float]:
        """Seconds of one call, ROUNDS times; short ones are repeated within a round."""
        work()
        self.settle()
        start = time.perf_counter()
        work()
        self.settle()
        once = max(time.perf_counter() - start, 1e-7)
        repeats = 1 if self.quick else max(1, min(2000, int(least_s / once)))
        rounds = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for _ in range(repeats):
                work()
            self.settle()
            rounds.append((time.perf_counter() - start) / repeats)
        return rounds

    def row(self, what: str, amount: float, unit: str, work: Callable[[], Any], **about: Any) -> Row:
        """``amount`` per call, as rates in ``unit`` per second."""
        rates = sorted(amount / s for s in self.seconds(work))
        entry = about | {"what": what, "unit": unit, "median": statistics.median(rates)}
        return entry | {"slowest": rates[0], "fastest": rates[-1]}


def links(bench: Bench) -> Iterator[Row]:
    """Both directions, from memory registered as the engine does it and from pageable memory; both directions at
    once."""
    for size in SIZES[:3] if bench.quick else SIZES:
        there = torch.empty(size, dtype=torch.uint8, device=bench.device)
        for kind in ("registered", "pageable"):
            here = allocate(size, pinned=bench.is_cuda and kind == "registered")[:size]
            here.fill_(1)
            about = {"memory": kind, "bytes": size}
            yield bench.row("h2d", size, "B/s", partial(there.copy_, here, non_blocking=True), **about)
            yield bench.row("d2h", size, "B/s", partial(here.copy_, there, non_blocking=True), **about)
    if bench.is_cuda:
        yield both_ways(bench)


def both_ways(bench: Bench) -> Row:
    """256 MiB in each direction at the same time, on two streams; bytes of both count."""
    size = 256 * MIB
    streams = [torch.cuda.Stream() for _ in range(2)]
    hosts = [allocate(size, pinned=True) for _ in range(2)]
    devices = [torch.empty(size, dtype=torch.uint8, device=bench.device) for _ in range(2)]

    def work() -> None:
        with torch.cuda.stream(streams[0]):
            devices[0].copy_(hosts[0], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            hosts[1].copy_(devices[1], non_blocking=True)

    return bench.row("h2d and d2h", 2 * size, "B/s", work, memory="registered", bytes=size)


def products(bench: Bench) -> Iterator[Row]:
    """x (rows, in) times a weight (out, in), by rows: at few rows the weight's own memory sets the pace."""
    inner, outer = (256, 1024) if bench.quick else WIDTHS
    kinds = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
    for name, dtype in kinds.items():
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        weight = torch.randn(outer, inner, device=bench.device, dtype=dtype)
        for rows in ROWS[:3] if bench.quick else ROWS:
            x = torch.randn(rows, inner, device=bench.device, dtype=dtype)
            flops = 2 * rows * inner * outer
            about = {"dtype": name, "rows": rows, "in": inner, "out": outer}
            yield bench.row("product", flops, "FLOP/s", partial(F.linear, x, weight), **about)
    torch.backends.cuda.matmul.allow_tf32 = False


def packed_products(bench: Bench) -> Iterator[Row]:
    """x (rows, in) times a weight (out, in) in 4 bits: as it lies, where this device has a kernel for it, and unpacked
    first. ``apart``: the largest difference of both, over the largest value."""
    inner, outer = (256, 1024) if bench.quick else WIDTHS
    compression, dtype = Compression(4), torch.float16
    weight = QuantizedWeight.of(torch.randn(outer, inner, device=bench.device, dtype=dtype), compression)
    fused = is_fused(bench.device, compression, dtype)
    for rows in PACKED_ROWS[:2] if bench.quick else PACKED_ROWS:
        x = torch.randn(rows, inner, device=bench.device, dtype=dtype)
        lying, unpacked = (multiply(x, weight, None).float() for multiply in (linear, tiled_linear))
        about = {"dtype": "float16/4", "rows": rows, "in": inner, "out": outer, "is_fused": fused}
        about["apart"] = float((lying - unpacked).abs().max() / unpacked.abs().max())
        for how, multiply in (("as it lies", linear), ("unpacked", tiled_linear)):
            work = partial(multiply, x, weight, None)
            yield bench.row("packed product", outer * inner, "values/s", work, how=how, **about)


def attention(bench: Bench) -> Iterator[Row]:
    """Prefill (FLOP/s, causal counted as half) and decode over a cache (bytes of keys and values per second)."""
    heads, tokens = (2, 32) if bench.quick else (HEADS, TOKENS)
    for sequences in (2,) if bench.quick else (1, 8, 48):
        shape = (sequences, heads, tokens, HEAD_DIM)
        q, k, v = (torch.randn(shape, device=bench.device, dtype=torch.float16) for _ in range(3))
        flops = 2 * sequences * heads * tokens * tokens * HEAD_DIM

        def prefill(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        yield bench.row("prefill attention", flops, "FLOP/s", prefill, sequences=sequences, tokens=tokens)
        yield decode(bench, q[:, :, 0], k, v, bench.device.type)


def host_attention(bench: Bench) -> Iterator[Row]:
    """Decode attention where the cache lies in host memory, next to what a plain copy of as many bytes takes."""
    heads, tokens = (2, 32) if bench.quick else (HEADS, TOKENS)
    torch.set_num_threads(psutil.cpu_count(logical=False) or 1)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        shape = (8, heads, tokens, HEAD_DIM)
        k, v = (torch.randn(shape, dtype=torch.float32).to(dtype) for _ in range(2))
        q = torch.randn(8, heads, HEAD_DIM, dtype=torch.float32).to(dtype)
        yield decode(bench, q, k, v, "host")
    source = torch.ones(MIB if bench.quick else GIB, dtype=torch.uint8)
    target = torch.empty_like(source)
    yield bench.row(
        "host copy", 2 * source.numel(), "B/s", lambda: target.copy_(source), threads=torch.get_num_threads()
    )


def decode(bench: Bench, q: Tensor, k: Tensor, v: Tensor, where: str) -> Row:
    size = 2 * k.numel() * k.element_size()
    about = {"where": where, "dtype": str(k.dtype).removeprefix("torch."), "sequences": len(q), "tokens": k.shape[2]}
    return bench.row(
        "decode attention", size, "B/s", lambda: decode_attention(q, [PlainSegment(k, v)], None, 0.1), **about
    )


def disk(bench: Bench) -> Iterator[Row]:
    """Direct reads of a new file into registered memory, 64 MiB at a time, as weights are streamed."""
    size, piece = (8 * MIB, 4 * MIB) if bench.quick else (4 * GIB, 64 * MIB)
    bench.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=bench.folder) as handle:
        block = os.urandom(piece)
        for _ in range(size // piece):
            handle.write(block)
        handle.flush()
        os.fsync(handle.fileno())
        file, into = DirectFile(Path(handle.name)), allocate(piece, pinned=bench.is_cuda)

        def read() -> None:
            for offset in range(0, size, piece):
                file.read(offset, into)

        yield bench.row("disk read", size, "B/s", read, bytes=size, direct=file.direct)
        file.close()


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "links": links,
    "products": products,
    "packed_products": packed_products,
    "attention": attention,
    "host_attention": host_attention,
    "disk": disk,
}


def shown(row: Row) -> str:
    about = ", ".join(f"{k}={v}" for k, v in row.items() if k not in ("what", "unit", "median", "slowest", "fastest"))
    return (
        f"{row['what']:18} {row['median'] / GB:10.2f} G{row['unit']}  "
        f"({row['slowest'] / GB:.2f}-{row['fastest'] / GB:.2f})  {about}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dir", type=Path, default=default_cache_dir())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("section", nargs="*", help=f"of {', '.join(SECTIONS)} (default: all)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA device here; --device cpu --quick tries the script out")
        return 1
    bench = Bench(torch.device(options.device), options.dir, options.quick)
    name = torch.cuda.get_device_name() if bench.is_cuda else "cpu"
    report: dict[str, Any] = {
        "evidence": "MEASURED",
        "device": name,
        "torch": torch.__version__,
        "rounds": ROUNDS,
        "rows": [],
        "errors": {},
    }
    for section, rows in SECTIONS.items():
        if options.section and section not in options.section:
            continue
        try:
            for row in rows(bench):
                report["rows"].append(row)
                print(shown(row), flush=True)
        except Exception as error:  # one section must not cost the others
            traceback.print_exc()
            report["errors"][section] = f"{type(error).__name__}: {error}"
        if bench.is_cuda:
            torch.cuda.empty_cache()
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
