"""Requests of mixed lengths through ``flexgen-bench batch``, through ``LLM.generate`` all at once, and through
``transformers`` one padded batch at a time in the order they came: seconds and CPU seconds of each.

    python benchmarks/batch_throughput.py --requests 2000 --rounds 1 --systems generate batch transformers

CPU seconds of this process are what to compare on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flexgen_bench import LLM, SamplingParams
from flexgen_bench.batch.output_file import OutputFile
from flexgen_bench.batch.plan import plan_text
from flexgen_bench.batch.progress import BatchProgress
from flexgen_bench.batch.run import Batch, Settings
from flexgen_bench.batch.scan import in_order, scan
from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.core.folders import path_argument
from flexgen_bench.core.shard import Shard
from flexgen_bench.requests.asked import Limits, Reader

SYSTEMS = ("generate", "batch", "transformers")


def requests(count: int, seed: int, prompt: int = 120, answer: int = 40) -> list[tuple[list[int], int]]:
    """Prompts of 4 tokens and more, answers of 2 and more: lengths evenly spread on a logarithmic scale."""
    draw = random.Random(seed)

    def length(least: int, most: int) -> int:
        factor: float = (most / least) ** draw.random()
        return round(least * factor)

    return [([draw.randrange(10, 40000) for _ in range(length(4, prompt))], length(2, answer)) for _ in range(count)]


def by_generate(llm: LLM, workload: Iterable[tuple[list[int], int]]) -> list[tuple[int, ...]]:
    workload = list(workload)
    params = [SamplingParams(max_tokens=new, ignore_eos=True) for _, new in workload]
    return [output.token_ids for output in llm.generate([prompt for prompt, _ in workload], params)]


def by_batch(llm: LLM, workload: Iterable[tuple[list[int], int]], folder: Path, window: int) -> int:
    path, out = folder / "in.jsonl", folder / "out.jsonl"
    with path.open("w") as file:
        for prompt, new in workload:
            file.write(json.dumps({"prompt": prompt, "max_tokens": new, "ignore_eos": True}) + "\n")
    for old in folder.glob("out.jsonl*"):
        old.unlink()
    reader = Reader(llm.tokenizer, llm.shape, ("m",), Limits(8000, 1000))
    scanned = scan([path], None, Shard())
    lines = scanned.lines
    settings = Settings(window, "m", {"temperature": 0.0})
    rows = in_order(scanned.order(), [path], None)
    plan_text(llm, reader, in_order(scanned.order()[:window], [path], None), scanned, settings)  # chooses the policy
    with OutputFile(out, {}, lines) as output, BatchProgress(lines, 0) as progress:
        Batch(llm, reader, output, settings, progress).run(rows)
        output.restore_order()
    return progress.totals.answer_tokens


def by_transformers(model: Any, workload: Iterable[tuple[list[int], int]], size: int = 32) -> None:
    import torch

    workload = list(workload)
    for start in range(0, len(workload), size):
        part = workload[start : start + size]
        longest, new = max(len(p) for p, _ in part), max(n for _, n in part)
        ids = torch.tensor([[0] * (longest - len(p)) + p for p, _ in part])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in part])
        with torch.no_grad():
            model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0
            )


def timed(name: str, work: Callable[[], object]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    print(f"{name:<13} {time.perf_counter() - wall:8.1f} s {time.process_time() - cpu:8.1f} CPU s", flush=True)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. The cache is the one that ``LLM`` takes where none is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--cache-dir", type=path_argument, default=default_cache_dir())
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--prompt", type=int, default=120, help="most tokens of a prompt")
    parser.add_argument("--answer", type=int, default=40, help="most new tokens")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    return parser.parse_args(arguments)


def main() -> None:
    options = parsed()
    workload = requests(options.requests, 0, options.prompt, options.answer)
    print(
        f"{options.requests} requests, {sum(len(p) for p, _ in workload)} + {sum(n for _, n in workload)} tokens",
        flush=True,
    )
    window = max(64, options.requests // 10 // 32 * 32)
    model: Any = None
    if "transformers" in options.systems:
        import torch
        from transformers import AutoModelForCausalLM

        from flexgen_bench.llm.model_source import checkpoint_of

        torch.set_num_threads(options.threads)
        folder, _ = checkpoint_of(options.model, "float32", options.cache_dir, lambda *_: None)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with (
        LLM(options.model, gpu="cpu", dtype="float32", cache_dir=options.cache_dir, threads=options.threads) as llm,
        tempfile.TemporaryDirectory() as folder_name,
    ):
        by_generate(llm, workload[:32])  # loads weights, starts threads
        for number in range(options.rounds):
            for name in options.systems if number % 2 == 0 else options.systems[::-1]:
                if name == "generate":
                    timed(name, lambda: by_generate(llm, workload))
                elif name == "batch":
                    timed(name, lambda: by_batch(llm, workload, Path(folder_name), window))
                else:
                    timed(name, lambda: by_transformers(model, workload))


if __name__ == "__main__":
    main()
