"""Matrix products of decode steps on the processor: the weight as right operand (torch's linear) or as left one.

``python benchmarks/small_products.py [--threads 2] [--out results/benchmarks/small_products.json]``

Interleaved, median of rounds; each product uses another copy of the weight, so that caches do not flatter it.
What follows from it is in docs/notes/cpu_products.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SHAPES = [(6144, 2048), (8192, 2048), (2048, 8192), (2048, 2048)]  # OPT-1.3B's matrices
ROWS = [1, 8, 32, 64, 128]
COPIES, ROUNDS = 4, 7

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "right": F.linear,
    "left": lambda x, weight: torch.mm(weight, x.t()).t().contiguous(),
}


def seconds(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> float:
    start = time.perf_counter()
    for weight in weights:
        product(x, weight)
    return (time.perf_counter() - start) / len(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for outputs, inputs in SHAPES:
            weights = [(torch.randn(outputs, inputs) * 0.02).to(dtype) for _ in range(COPIES)]
            for count in ROWS:
                x = torch.randn(count, inputs).to(dtype)
                taken: dict[str, list[float]] = {name: [] for name in PRODUCTS}
                with torch.inference_mode():
                    for _ in range(ROUNDS):
                        for name, product in PRODUCTS.items():
                            taken[name].append(seconds(product, x, weights))
                flops = 2 * count * outputs * inputs
                row = {"dtype": str(dtype), "weight": [outputs, inputs], "rows": count, "seconds": taken}
                rows.append(row)
                rates = {n: flops / statistics.median(s) / 1e9 for n, s in taken.items()}
                shown = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in rates.items())
                print(f"{dtype} {outputs}x{inputs}, {count} rows: {shown}", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps({"evidence": "MEASURED", "threads": options.threads, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
