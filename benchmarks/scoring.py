"""Scoring real items: the engine against transformers at its best batch, SmolLM2-135M.

``python benchmarks/scoring.py [--quick] [--threads 2] [--out results/benchmarks/scoring.json]``; the tasks' data must
be there (``python -m flexgen_bench fetch --help``).

transformers is lm-eval's own ``hf`` model: requests sorted by length, padded batches, one-token continuations of the
same context computed once. Its batch size and dtype are the fastest of all tried on a share of the items. Then both
take turns on all items. The engine is measured twice: laid out as it always is, and with no more shared than
transformers shares, which shows what packing alone is worth. Tokens are those that the requests hold, whether they were
computed once or often: both systems are asked the same.

Bar: requests per second, engine / transformers >= 1.2 over all tasks together, and no task below 1. Bound: what the
engine computes takes at least its matrix products' time at the rate at which this processor multiplies them alone
(measured here, at 1024 rows).
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Bar, Options, Report, median, options
from torch.nn import functional as F

from flexgen_bench.accuracy.data.tasks import load_tasks
from flexgen_bench.accuracy.run.lm import SystemLM, make_lm
from flexgen_bench.core.status import Evidence
from flexgen_bench.planner.scoring import TREE_ROWS
from flexgen_bench.schedule import prefix_tree as tree
from flexgen_bench.schedule.prefix_tree import ScoreRequest, grow

MODEL = "smollm2-135m"
TASKS = ("lambada", "hellaswag", "openbookqa", "boolq", "mmlu", "wikipedia_text")
ITEMS, QUICK_ITEMS, TUNING_ITEMS = 24, 6, 6
# Plain text is longer than any other item, and there is enough of it in a few.
TEXTS = 4
BATCHES, DTYPES = (1, 4, 8, 16, 32, 64), ("float32", "bfloat16")
MAX_LENGTH = 1024
LIMIT, TASK_LIMIT = 1.2, 1.0

Instances = dict[str, list[Any]]


def main() -> int:
    opts = options(__doc__)
    torch.set_num_threads(opts.threads)
    everything = instances(opts, QUICK_ITEMS if opts.quick else ITEMS)
    tuning = instances(opts, 2 if opts.quick else TUNING_ITEMS)
    tried = tune(opts, tuning)
    dtype, batch = min(tried, key=lambda key: tried[key])
    engine = make_lm(
        "flexgen", MODEL, dtype="float32", threads=opts.threads, cache_dir=opts.cache, max_length=MAX_LENGTH
    )
    reference = hf_model(opts, dtype, batch)
    systems: dict[str, Callable[[str, list[Any]], float]] = {
        "transformers": lambda kind, requests: timed(reference, kind, requests),
        "engine": lambda kind, requests: timed(engine, kind, requests),
        "engine, packed alone": lambda kind, requests: without_sharing(engine, kind, requests),
    }
    seconds: dict[str, dict[str, list[float]]] = {s: {t: [] for t in everything} for s in systems}
    for task, requests in everything.items():
        kind = requests[0].request_type
        for run in systems.values():
            run(kind, requests[:4])  # warm-up
        for _ in range(opts.rounds):
            for name, run in systems.items():
                seconds[name][task].append(run(kind, requests))
    report = Report("scoring", Evidence.MEASURED, opts)
    counts = {task: count(engine, requests) for task, requests in everything.items()}
    report.settings = {
        "model": MODEL,
        "tasks": counts,
        "transformers": {"dtype": dtype, "batch_size": batch},
        "engine": {"dtype": "float32", "forest_rows": TREE_ROWS},
        "max_length": MAX_LENGTH,
        "tuning_seconds": {f"{d}, batch {b}": s for (d, b), s in tried.items()},
    }
    report.rounds = [{"system": s, "seconds": of_task} for s, of_task in seconds.items()]
    flops = (2 * linear_values(engine)).tolist()
    rate = product_rate(engine)
    bound_s = sum(c["rows_computed"] * flops[0] + c["rows_scored"] * flops[1] for c in counts.values()) / rate
    report.bars = bars(seconds, counts, bound_s)
    total = median(totals(seconds["engine"]))
    report.where_time_goes.append(
        f"matrix products alone at {rate / 1e9:.0f} GFLOP/s: {bound_s:.1f} s of the engine's {total:.1f} s"
    )
    report.where_time_goes += [
        f"transformers, {d}, batch {b}: {s:.1f} s for the tuning items"
        for (d, b), s in sorted(tried.items(), key=lambda item: item[1])
    ]
    engine.close()
    return report.finish()


def instances(opts: Options, items: int) -> Instances:
    """lm-eval's requests of the first items of each task."""
    by_task: Instances = {}
    for name in TASKS:
        (task,) = load_tasks([name], TEXTS if name == "wikipedia_text" else items, opts.cache).values()
        task.build_all_requests(limit=items, rank=0, world_size=1)
        by_task[name] = list(task.instances)
    return by_task


def hf_model(opts: Options, dtype: str, batch: int) -> Any:
    """lm-eval's own model over transformers, on the same checkpoint."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flexgen_bench.llm.model_source import checkpoint_of

    folder, _ = checkpoint_of(MODEL, dtype, opts.cache, lambda what, done, total: None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return HFLM(
        pretrained=model,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        device="cpu",
        batch_size=batch,
        max_length=MAX_LENGTH,
    )


def tune(opts: Options, by_task: Instances) -> dict[tuple[str, int], float]:
    """Seconds for all tasks, of every batch size and dtype. A batch that is slower than the best by half ends its
    dtype's row."""
    seconds: dict[tuple[str, int], float] = {}
    for dtype in DTYPES:
        model = hf_model(opts, dtype, 1)
        for batch in BATCHES:
            model.batch_size_per_gpu = batch
            took = sum(timed(model, a[0].request_type, a) for a in by_task.values())
            seconds[dtype, batch] = took
            if took > 1.5 * min(seconds.values()):
                break
        del model
        gc.collect()
    return seconds


def timed(model: Any, kind: str, requests: list[Any]) -> float:
    start = time.perf_counter()
    getattr(model, kind)(requests, disable_tqdm=True)
    return time.perf_counter() - start


def without_sharing(engine: SystemLM, kind: str, requests: list[Any]) -> float:
    usual, tree.ROW_PAIRS = tree.ROW_PAIRS, 0  # only what is alike altogether is then shared
    try:
        return timed(engine, kind, requests)
    finally:
        tree.ROW_PAIRS = usual


def count(engine: SystemLM, lm_requests: Sequence[Any]) -> dict[str, int]:
    """Requests and tokens asked, rows computed and scored."""
    seen: list[ScoreRequest] = []

    class Counting:
        def score(self, requests: Sequence[ScoreRequest], on_score: Any) -> None:
            seen.extend(requests)

    real, engine._scorer = engine._scorer, Counting()  # type: ignore[assignment]
    try:
        getattr(engine, lm_requests[0].request_type)(lm_requests, disable_tqdm=True)
    finally:
        engine._scorer = real
    grown = grow(seen, TREE_ROWS)
    return {
        "requests": len(lm_requests),
        "tokens": sum(len(r.tokens) - 1 for r in seen),
        "rows_computed": sum(f.rows for f in grown),
        "rows_scored": sum(len(f.logit_rows) for f in grown),
    }


def linear_values(engine: SystemLM) -> torch.Tensor:
    """Values of all layers' matrices, and of the head."""
    shape = engine._scorer._llm.shape  # type: ignore[attr-defined]
    h, f, d = shape.hidden_size, shape.ffn_size, shape.head_dim
    layer = h * (2 * shape.num_heads + 2 * shape.num_kv_heads) * d + 3 * h * f
    return torch.tensor([layer * shape.num_layers, h * shape.vocab_size]).double()


def product_rate(engine: SystemLM) -> float:
    """FLOP/s of the model's largest product by itself, the best of several."""
    shape = engine._scorer._llm.shape  # type: ignore[attr-defined]
    x, w = torch.randn(TREE_ROWS, shape.hidden_size), torch.randn(2 * shape.ffn_size, shape.hidden_size)
    best = 1e9
    for _ in range(20):
        start = time.perf_counter()
        F.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return 2 * x.numel() * w.shape[0] / best


def totals(by_task: dict[str, list[float]]) -> list[float]:
    return [sum(each) for each in zip(*by_task.values(), strict=True)]


def bars(seconds: dict[str, dict[str, list[float]]], counts: dict[str, dict[str, int]], bound_s: float) -> list[Bar]:
    theirs, ours, packed = (seconds[s] for s in ("transformers", "engine", "engine, packed alone"))
    requests, tokens = (sum(c[key] for c in counts.values()) for key in ("requests", "tokens"))

    def rates(took: float) -> str:
        return f"{requests / took:.1f} requests/s, {tokens / took:.0f} tokens/s"

    total = totals(theirs)
    shown = [
        Bar(
            "all tasks: engine / transformers",
            f"{rates(bound_s)} (matrix products alone)",
            f"{rates(median(totals(ours)))} / {rates(median(total))}",
            tuple(t / o for t, o in zip(total, totals(ours), strict=True)),
            LIMIT,
            False,
        ),
        Bar(
            "all tasks, packed alone",
            "",
            rates(median(totals(packed))),
            tuple(t / o for t, o in zip(total, totals(packed), strict=True)),
            TASK_LIMIT,
            False,
        ),
    ]
    for task, c in counts.items():
        took = median(ours[task])
        shown.append(
            Bar(
                f"{task}: {c['requests']} requests",
                f"{c['rows_computed']} of {c['tokens']} rows",
                f"{c['tokens'] / took:.0f} / {c['tokens'] / median(theirs[task]):.0f} tokens/s",
                tuple(t / o for t, o in zip(theirs[task], ours[task], strict=True)),
                TASK_LIMIT,
                False,
            )
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
