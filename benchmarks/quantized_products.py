"""Products on the processor with float32, 16-bit and quantized weights: torch's, this project's, and their fallbacks.

``python benchmarks/quantized_products.py [--threads 2] [--rows 1 8 32]
[--out results/benchmarks/quantized_products.json]``

Interleaved rounds; each product uses another copy of the weight, so that caches do not flatter it. Two rates per
product: GFLOP/s by the clock (best round), and by the processor time that all threads took, times the number of
threads: the second one hardly changes when something else runs beside it. What follows is in docs/notes/cpu_products.md
and compression.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flexgen_bench.core.compression import Compression
from flexgen_bench.kernels.narrow_linear import narrow_linear, tiled_linear
from flexgen_bench.kernels.quantization import QuantizedWeight, dequantize_with_torch, quantize

SHAPES = [(6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192), (50272, 2048)]  # OPT-1.3B
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024]
# Bytes of a weight's copies together: more than the last cache of common processors holds would take too long to make.
COPIES_BYTES, ROUNDS = 200_000_000, 4

Weight = Tensor | QuantizedWeight


def left(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(weight, x.t()).t().contiguous()


def products(weights: list[Tensor]) -> dict[str, tuple[Callable[..., Tensor], list[Any]]]:
    """Name -> (product of x and a weight, the copies of the weight). Only some make sense for a type."""
    dtype = weights[0].dtype
    variants: dict[str, tuple[Callable[..., Tensor], list[Any]]] = {
        "torch": (F.linear, list(weights)),
        "native": (lambda x, w: narrow_linear(x, w, None), list(weights)),
    }
    if dtype is torch.float32:
        variants["torch, weight left"] = (left, list(weights))
    if dtype is torch.bfloat16:
        for bits in (3, 4, 8):
            packed = [QuantizedWeight.of(w, Compression(bits)) for w in weights]
            variants[f"native, {bits}-bit"] = (lambda x, w: narrow_linear(x, w, None), packed)
            if bits == 4:
                variants["torch, 4-bit by tiles"] = (lambda x, w: tiled_linear(x, w, None), packed)
    return variants


def measure(x: Tensor, cases: dict[str, tuple[Callable[..., Tensor], list[Any]]]) -> dict[str, Any]:
    """Seconds per product of each case, by clock and by processor time, one number per round."""
    taken: dict[str, Any] = {name: {"clock": [], "processor": []} for name in cases}
    for number in range(ROUNDS + 1):
        for name, (product, weights) in cases.items():
            clock, processor = time.perf_counter(), time.process_time()
            for weight in weights:
                product(x, weight)
            if number:  # the first round compiles and warms up
                taken[name]["clock"].append((time.perf_counter() - clock) / len(weights))
                taken[name]["processor"].append((time.process_time() - processor) / len(weights))
    return taken


def conversions(threads: int) -> list[dict[str, Any]]:
    """Values per second of quantizing (torch) and dequantizing (native, torch) a matrix in bfloat16."""
    weight = (torch.randn(6144, 2048) * 0.02).bfloat16()
    results: list[dict[str, Any]] = []
    for bits in (3, 4, 8):
        compression = Compression(bits)
        packed, out = QuantizedWeight.of(weight, compression), torch.empty_like(weight)
        cases: dict[str, tuple[Callable[..., Any], list[Any]]] = {
            "quantize": (lambda _, w, c=compression: quantize(w, c), [weight]),
            "dequantize": (lambda _, w, out=out: w.rows(0, 6144, out=out), [packed]),
            "dequantize, torch": (
                lambda _, w, out=out: dequantize_with_torch(w.codes, w.params, out, w.compression),
                [packed],
            ),
        }
        taken = measure(weight, cases)
        results.append({"bits": bits, "values": weight.numel(), "seconds": taken})
        shown = ", ".join(
            f"{case} {weight.numel() / min(s['clock']) / 1e9:.2f} "
            f"({weight.numel() * threads / min(s['processor']) / 1e9:.2f})"
            for case, s in taken.items()
        )
        print(f"{bits} bits, 1e9 values/s: {shown}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shapes", type=int, nargs="+", default=list(range(len(SHAPES))))
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    converted = conversions(options.threads)
    results: list[dict[str, Any]] = []
    for name in options.types:
        dtype = getattr(torch, name)
        for outputs, inputs in [SHAPES[i] for i in options.shapes]:
            size = outputs * inputs * dtype.itemsize
            copies = max(1, min(4, COPIES_BYTES // size))
            cases = products([(torch.randn(outputs, inputs) * 0.02).to(dtype) for _ in range(copies)])
            for rows in options.rows:
                x = torch.randn(rows, inputs).to(dtype)
                with torch.inference_mode():
                    taken = measure(x, cases)
                results.append({"dtype": name, "weight": [outputs, inputs], "rows": rows, "seconds": taken})
                flops = 2e-9 * rows * outputs * inputs
                shown = ", ".join(
                    f"{case} {flops / min(s['clock']):.0f} ({flops * options.threads / min(s['processor']):.0f})"
                    for case, s in taken.items()
                )
                print(f"{name} {outputs}x{inputs}, {rows} rows, GFLOP/s: {shown}", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"evidence": "MEASURED", "threads": options.threads, "conversions": converted, "rows": results}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
