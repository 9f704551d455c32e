"""Everything resident on a processor: this engine in 16 and 4 bits (``-8``: with activations in 8 bits) beside
llama.cpp.

``python benchmarks/cpu_products.py [--quick] [--rounds 3] [--out results/benchmarks/cpu_products.json]``

One sequence and 32 of them, in one run. A Llama of 1.2e9 weights (the layers of Llama 3.2 1B, a head of its own), 32
prompt tokens and 32 generated ones per sequence, random weights. All systems stay loaded, each in a process of its own
(some 7 GB; ``--systems`` chooses), and take turns within a round, so that what else runs on the machine disturbs all of
them alike. tokens/s: generated tokens over prefill and decode together.
``dram`` is the rate at which the same cores read memory, measured in every round.
What follows from it is in docs/notes/cpu_products.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from common import Bar, Options, Report, median
from llama_cpp_runs import LlamaCpp, write_random
from workers import Worker, answer, worker

from baselines.llama_cpp.formats import Format
from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import EXACT, Compression, Lossy
from flexgen_bench.core.model import ModelShape
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.units import GB, MIB

SHAPE = ModelShape(
    name="llama-1.2b",
    family="llama",
    num_layers=16,
    hidden_size=2048,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    ffn_size=8192,
    vocab_size=49152,
    max_positions=8192,
    tied_embeddings=False,
    options={},
)
QUICK = ModelShape(
    name="llama-40m",
    family="llama",
    num_layers=4,
    hidden_size=512,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    ffn_size=2048,
    vocab_size=8192,
    max_positions=2048,
    tied_embeddings=False,
    options={},
)
PROMPT, NEW, MANY = 32, 32, 32
ONES = 4  # jobs of one sequence in a turn: they are short
# What our engine may change of results, and llama.cpp's type of weights.
OURS = {
    "ours-16": EXACT,
    "ours-4": Lossy(weights=Compression(4)),
    "ours-4-8": Lossy(weights=Compression(4), activations=8),
}
THEIRS = {"llama-bf16": Format.BF16, "llama-f16": Format.F16, "llama-q4": Format.Q4_0}
DEFAULT = ("ours-16", "llama-bf16", "llama-f16", "ours-4", "ours-4-8", "llama-q4")


class Ours:
    """This engine, everything on the cpu tier."""

    def __init__(self, shape: ModelShape, lossy: Lossy, opts: Options) -> None:
        import torch
        from engine_runs import resident

        torch.set_num_threads(opts.threads)
        self._shape, self._stack = shape, ExitStack()
        made = self._stack.enter_context(resident(shape, lossy, MANY, opts))
        self._engine, self.weight_bytes = made
        self.run(1, 16, 2)

    def run(self, sequences: int, prompt: int, new: int) -> tuple[float, Sequence[float]]:
        from engine_runs import Shape, run

        timing = run(self._engine, Shape(sequences, prompt, new), self._shape.vocab_size)
        return timing.wall_s, timing.pass_s


class Theirs:
    def __init__(self, shape: ModelShape, form: Format, opts: Options) -> None:
        file = write_random(shape, form, opts.cache / "gguf" / f"{shape.name}-{form}.gguf")
        self._model = LlamaCpp(file, shape.vocab_size, opts.threads, MANY, PROMPT + NEW)

    def run(self, sequences: int, prompt: int, new: int) -> tuple[float, Sequence[float]]:
        timing = self._model.run(sequences, prompt, new)
        return timing.wall_s, timing.step_s


class Memory:
    """The rate at which memory is read, in place of a model."""

    def __init__(self, opts: Options) -> None:
        import torch

        torch.set_num_threads(opts.threads)
        self._buffer = torch.ones(512 * MIB, dtype=torch.uint8)

    def rate(self) -> float:
        """Of the fastest of some loops that read half a gigabyte each, as long as a step takes."""
        from cpu_attention import READ_LOOPS, read_all

        return max(read_all(self._buffer, *loop) for loop in READ_LOOPS)


def serve(name: str, opts: Options) -> None:
    """A worker, which is asked with a number of sequences."""
    shape = QUICK if opts.quick else SHAPE
    made: Any
    if name == "dram":
        made = Memory(opts)
    elif name in OURS:
        made = Ours(shape, OURS[name], opts)
    else:
        made = Theirs(shape, THEIRS[name], opts)

    def measure(sequences: str) -> Mapping[str, Any]:
        if name == "dram":
            return {"bytes_per_s": made.rate()}
        wall, steps = made.run(int(sequences), PROMPT, NEW)
        return {"wall_s": wall, "step_s": list(steps), "bytes": getattr(made, "weight_bytes", 0)}

    answer(measure)


def loaded(name: str, opts: Options) -> AbstractContextManager[Worker]:
    command = [sys.executable, __file__, "--worker", name, "--threads", str(opts.threads)]
    command += ["--cache", str(opts.cache), *(["--quick"] if opts.quick else [])]
    return worker(name, command, name not in THEIRS)


def turn(workers: Mapping[str, Worker], many: bool) -> dict[str, Any]:
    """One round: every system's figures."""
    figures: dict[str, Any] = {name: {} for name in workers}
    rates = []
    for _ in range(ONES):
        for name, process in workers.items():
            if name == "dram":
                rates.append(process.ask(0)["bytes_per_s"])
            else:
                figures[name].setdefault("one", []).append(process.ask(1))
    figures["dram"] = median(rates)
    for name, process in workers.items():
        if many and name != "dram":
            figures[name]["many"] = process.ask(MANY)
    return figures


def one(figures: Mapping[str, Any]) -> float:
    """tokens/s of one sequence: the median job of the turn."""
    return median([NEW / job["wall_s"] for job in figures["one"]])


def step(figures: Mapping[str, Any]) -> float:
    """Seconds of a decode step of one sequence: the median of the turn's."""
    return median([s for job in figures["one"] for s in job["step_s"]])


def many(figures: Mapping[str, Any]) -> float:
    return MANY * NEW / float(figures["many"]["wall_s"])


def bars(rounds: Sequence[Mapping[str, Any]]) -> Iterator[Bar]:
    first = rounds[0]

    def compared(ours: str, theirs: Sequence[str], kind: str, limit: float) -> Iterator[Bar]:
        rate = one if kind == "one" else many
        others = [name for name in theirs if kind in first.get(name, {})]
        if kind not in first.get(ours, {}) or not others:
            return
        best = max(others, key=lambda name: median([rate(r[name]) for r in rounds]))
        mine, other = ([rate(r[name]) for r in rounds] for name in (ours, best))
        yield Bar(
            f"{ours} / {best}, {kind}",
            f"{median(other):.2f} tokens/s",
            f"{median(mine):.2f} tokens/s",
            tuple(m / o for m, o in zip(mine, other, strict=True)),
            limit,
            at_most=False,
        )

    sixteen = ("llama-bf16", "llama-f16")
    for four in ("ours-4", "ours-4-8"):
        yield from compared(four, ("llama-q4",), "many", 1.1)
        yield from compared(four, ("llama-q4",), "one", 0.9)
        yield from compared(four, ("ours-16",), "many", 1.3)
    yield from compared("ours-16", sixteen, "many", 1.1)
    yield from compared("ours-16", sixteen, "one", 0.95)
    for name, limit in (("ours-16", 0.8), ("ours-4", 0.6), ("ours-4-8", 0.6)):
        if "one" in first.get(name, {}):
            size = first[name]["one"][0]["bytes"]
            rates = [size / step(r[name]) for r in rounds]
            yield Bar(
                f"{name}, weights read in a step / DRAM",
                f"{median([r['dram'] for r in rounds]) / GB:.1f} GB/s",
                f"{median(rates) / GB:.1f} GB/s",
                tuple(x / r["dram"] for x, r in zip(rates, rounds, strict=True)),
                limit,
                at_most=False,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, one round, no verdict")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--systems", nargs="+", choices=[*OURS, *THEIRS], default=DEFAULT)
    parser.add_argument("--only-one", action="store_true", help="leave out jobs of 32 sequences")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cache", type=Path, default=default_cache_dir())
    parser.add_argument("--worker", choices=["dram", *OURS, *THEIRS], help=argparse.SUPPRESS)
    given = parser.parse_args()
    opts = Options(given.quick, 1 if given.quick else given.rounds, given.threads, given.out, given.cache)
    if given.worker:
        serve(given.worker, opts)
        return 0
    report = Report("cpu products", Evidence.MEASURED, opts)
    report.settings = {"prompt": PROMPT, "new": NEW, "shape": to_json(QUICK if opts.quick else SHAPE)}
    with ExitStack() as stack:
        names = ["dram", *given.systems]
        workers = {name: stack.enter_context(loaded(name, opts)) for name in names}
        for _ in range(opts.rounds):
            report.rounds.append(turn(workers, not given.only_one))
            print("\n".join(bars_so_far(report.rounds)), flush=True)
    report.bars = list(bars(report.rounds))
    return report.finish()


def bars_so_far(rounds: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Progress: the last round's figures."""
    last = rounds[-1]
    yield f"round {len(rounds)}: memory {last['dram'] / GB:.1f} GB/s"
    for name, figures in last.items():
        if name != "dram":
            shown = f"{one(figures):.2f} tokens/s alone, step {step(figures) * 1e3:.1f} ms"
            yield f"  {name}: {shown}" + (f", {many(figures):.2f} of {MANY}" if "many" in figures else "")


if __name__ == "__main__":
    sys.exit(main())
