"""A mixture of experts under a memory cap of half its weights: this engine from disk beside llama.cpp by mmap.

``python benchmarks/capped_mixture.py [--quick] [--rounds 3] [--out results/benchmarks/capped_mixture.json]``

A Mixtral's form of 1.1e9 weights (eight experts, two for a token), random, the same numbers for both in bfloat16; 32
prompts of 32 tokens, 32 generated ones each, so that every expert is touched in every pass. Each system is a process in
a control group of its own, which counts what the page cache keeps for it, too, stays loaded, and takes turns with the
other. This engine chooses its policy for the cap (``LLM.generate``). tokens/s: generated tokens over prefill and decode
together.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import Bar, Options, Report, median
from workers import Worker, answer, worker

from baselines.llama_cpp.formats import Format
from baselines.llama_cpp.settings import Load
from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.core.cell import ModelSpec
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.model import DType, ModelShape
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.units import GIB, MIB, format_bytes
from flexgen_bench.runner.memory_cap import MemoryGroup, create_group

_OPTIONS = {
    "rope_theta": 1e6,
    "rope_scaling": None,
    "norm_eps": 1e-5,
    "activation": "silu",
    "window": None,
    "experts": 8,
    "experts_per_token": 2,
}
SHAPE = ModelShape("mixtral-1.1b", "mixtral", 16, 1024, 16, 4, 64, 2560, 32000, 4096, False, _OPTIONS)
QUICK = ModelShape("mixtral-30m", "mixtral", 4, 256, 8, 4, 32, 512, 4096, 4096, False, _OPTIONS)
PROMPT, NEW, MANY = 32, 32, 32
SYSTEMS = ("ours", "llama.cpp")
LIMIT = 2.0


@dataclass(frozen=True)
class Capped:
    """A system's process and its group."""

    worker: Worker
    group: MemoryGroup

    def ask(self) -> Mapping[str, Any]:
        try:
            return self.worker.ask()
        except RuntimeError as error:
            raise RuntimeError(f"{error}: {self.group.result()}") from error


class Ours:
    """The library as anybody would call it."""

    def __init__(self, folder: Path, opts: Options) -> None:
        from flexgen_bench import LLM

        self._llm = LLM(folder, dtype=DType.BFLOAT16, gpu="cpu", cache_dir=opts.cache, threads=opts.threads)
        self._opts = opts

    def run(self) -> Mapping[str, Any]:
        from flexgen_bench import SamplingParams

        vocab = (QUICK if self._opts.quick else SHAPE).vocab_size
        # llama.cpp's tokens, as its runs here have them.
        prompts = [[((7 * t + s) % 1000 + 5) % vocab for t in range(PROMPT)] for s in range(MANY)]
        self._llm.generate(prompts, SamplingParams(max_tokens=NEW, ignore_eos=True))
        job = self._llm.last_job
        assert job is not None
        lanes = {str(lane): use.busy_s for lane, use in job.lanes.items() if use.steps}
        return {
            "wall_s": job.prefill_s + job.decode_s,
            "prefill_s": job.prefill_s,
            "lanes": lanes,
            "policy": to_json(self._llm.policy),
        }


class LlamaCppMixture:
    def __init__(self, folder: Path, opts: Options) -> None:
        from llama_cpp_runs import LlamaCpp

        vocab = (QUICK if opts.quick else SHAPE).vocab_size
        # llama.cpp's default: mapped, but for what it copies into an order that it multiplies faster.
        self._model = LlamaCpp(gguf_of(folder, opts), vocab, opts.threads, MANY, PROMPT + NEW, Load.MMAP)

    def run(self) -> Mapping[str, Any]:
        batch = self._model.run(MANY, PROMPT, NEW)
        return {"wall_s": batch.wall_s, "prefill_s": batch.prefill_s, "step_s": list(batch.step_s)}


def gguf_of(folder: Path, opts: Options) -> Path:
    from baselines.llama_cpp.gguf_file import gguf_path, write_gguf

    target = gguf_path(folder, Format.BF16, opts.cache)
    return write_gguf(folder, Format.BF16, target, opts.threads, lambda *_: None)


def serve(name: str, folder: Path, opts: Options) -> None:
    """A worker, which does the same in every turn."""
    system = Ours(folder, opts) if name == "ours" else LlamaCppMixture(folder, opts)
    answer(lambda _: system.run())


@contextmanager
def capped(name: str, folder: Path, cap_bytes: int, opts: Options) -> Iterator[Capped]:
    command = [sys.executable, __file__, "--worker", name, "--folder", str(folder), "--threads", str(opts.threads)]
    command += ["--cache", str(opts.cache), *(["--quick"] if opts.quick else [])]
    group = create_group(cap_bytes, f"flexgen-mixture-{name}-{os.getpid()}")
    try:
        with worker(f"{name} under {format_bytes(cap_bytes)}", command, name == "ours", group.join) as started:
            yield Capped(started, group)
    finally:
        group.remove()


def forget(*files: Path) -> None:
    """Drop files from the page cache: what is in it already, nobody's group pays for."""
    os.sync()
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(measured: Mapping[str, Any]) -> float:
    return MANY * NEW / float(measured["wall_s"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, one round, no verdict")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cache", type=Path, default=default_cache_dir())
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    opts = Options(given.quick, 1 if given.quick else given.rounds, given.threads, given.out, given.cache)
    if given.worker:
        serve(given.worker, given.folder, opts)
        return 0
    shape = QUICK if opts.quick else SHAPE
    folder = prepare_checkpoint(ModelSpec(shape), DType.BFLOAT16, opts.cache, lambda *_: None)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    cap = GIB if opts.quick else weights // 2 // MIB * MIB
    gguf = gguf_of(folder, opts)
    # Packed before the cap holds: it is made once, and kept.
    from flexgen_bench.engine.build import PackedWeights

    PackedWeights.from_checkpoint(folder, DType.BFLOAT16, opts.cache)
    forget(gguf, *(f for f in (opts.cache / "packed").rglob("*") if f.is_file()))
    report = Report("a capped mixture", Evidence.MEASURED, opts)
    report.settings = {"prompt": PROMPT, "new": NEW, "sequences": MANY, "cap_bytes": cap, "weight_bytes": weights}
    report.settings["shape"] = to_json(shape)
    with capped("ours", folder, cap, opts) as ours, capped("llama.cpp", folder, cap, opts) as theirs:
        for number in range(opts.rounds):
            turn = {"ours": ours.ask(), "llama.cpp": theirs.ask()}
            report.rounds.append(turn)
            print(
                f"round {number + 1}: " + ", ".join(f"{n} {rate(m):.2f} tokens/s" for n, m in turn.items()), flush=True
            )
        caps = {"ours": ours.group.result(), "llama.cpp": theirs.group.result()}
    report.settings["memory"] = {name: asdict(result) for name, result in caps.items()}
    mine, other = ([rate(turn[name]) for turn in report.rounds] for name in SYSTEMS)
    report.bars.append(
        Bar(
            f"{format_bytes(weights)} of weights under {format_bytes(cap)}",
            f"{median(other):.2f} tokens/s (llama.cpp)",
            f"{median(mine):.2f} tokens/s",
            tuple(m / o for m, o in zip(mine, other, strict=True)),
            LIMIT,
            at_most=False,
        )
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
