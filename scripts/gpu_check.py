"""Run the checks that need a CUDA device, step by step:
``scripts/gpu_check.sh [--budget S [--quick]] [--list] [--again] [--for S] [step ...]``.

``--budget S``: a short stay. Steps of another list, those that teach most first, that together take no more than S
seconds: the rest is left out from its end. Policies are stated, nothing is searched for or calibrated, and what all of
them find is in one file. ``--quick``: the same with tiny models on the emulated accelerator.

Each step is a process with a time limit; what it finds is in its own record as soon as it ends, and how it ended is
noted in results/benchmarks/gpu_check/steps.json. Steps that ended well are not run again, so the command can be given
again and again (--again forgets that). A step that fails does not stop the next one. Exit status: 0 if every step asked
for has ended well, 1 if one has not, 2 for an unknown step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
SUITE = "gpu16"
# A cell's own clock leaves out what comes before and after: preparing the model, packing weights. What is cut off there
# goes on at the next start.
AROUND_A_CELL_S = 60.0
LONGEST_S = 590.0
TAIL_LINES = 12


@dataclass(frozen=True)
class Step:
    """One step. ``command`` follows the Python that runs this script. ``is_cell``: it ends with the command line's JSON
    document, whose statuses say how it went. ``expected_s``: what it takes if nothing is wrong; 0: nobody said."""

    name: str
    what: str
    command: tuple[str, ...]
    limit_s: float
    is_cell: bool = False
    expected_s: float = 0


_QUIET = ("-q", "-p", "no:cacheprovider", "-W", "default", "--continue-on-collection-errors")
GPU_TESTS = ("-m", "pytest", "-m", "gpu", *_QUIET)
# Of a short stay: name, what it shows, seconds it is expected to take, seconds at most.
SHORT = (
    ("layer", "12 resident layers of OPT-6.7B, eager and as graphs: launches, where the time goes", 60, 120),
    ("products", "products of few rows with 4-bit weights, as they lie and unpacked", 20, 90),
    ("threads", "attention on the processor with all cores, and with 2 and 4 left to the lanes", 60, 120),
    ("resident", "OPT-6.7B, everything resident, 7 sequences", 60, 150),
    ("original", "FlexGen 0.1.8 on OPT-6.7B in batches of 2 and larger", 90, 180),
    ("4bit", "OPT-6.7B, weights in 4 bits and resident", 70, 150),
    ("30b", "OPT-30B, 48 prompts, weights streamed", 170, 300),
    ("tokens", "tokens equal to those of transformers, under four policies", 60, 120),
    ("175b", "OPT-175B in 4 bits, 12 of its 96 layers (PROJECTED)", 100, 200),
)


def short_steps(results: Path, quick: bool) -> list[Step]:
    """Of a short stay, those that teach most first. Two files: the environment, and what the others find."""
    out = results / "benchmarks/gpu_check"
    environment = ("scripts/gpu_environment.py", "--out", str(out / "environment.json"))
    what = "the GPU, its driver and link, torch, memory, disk, which packages are there"
    steps = [] if quick else [Step("environment", what, environment, 120, expected_s=45)]
    for name, shows, expected_s, limit_s in SHORT:
        words = ["benchmarks/gpu_short.py", name, "--out", str(out / "short.json")]
        words += ["--quick", "--cache", str(results / "cache")] if quick else []
        steps.append(Step(f"short:{name}", shows, tuple(words), limit_s, expected_s=1 if quick else expected_s))
    return steps


def all_steps(results: Path) -> list[Step]:
    """In the order to run them: cheap and telling ones first."""
    out = results / "benchmarks"
    steps = [
        Step(
            "environment",
            "the GPU, its driver and link, torch, memory, disk, which packages are there",
            ("scripts/gpu_environment.py", "--out", str(out / "gpu_check/environment.json")),
            120,
        ),
        Step(
            "kernels",
            "pytest -m gpu tests/kernels: what is compiled here says what its reference says",
            (*GPU_TESTS, "tests/kernels"),
            200,
        ),
        Step("tests", "pytest -m gpu: tokens, memory, copies, streams", (*GPU_TESTS, "tests"), 560),
        Step(
            "rates",
            "speed of the links, of matrix products, attention, the disk",
            ("benchmarks/gpu_rates.py", "--out", str(out / "gpu_rates.json")),
            400,
        ),
    ]
    suite = yaml.safe_load((ROOT / "conf/suite" / f"{SUITE}.yaml").read_text())
    for cell in suite["cells"]:
        limits = [float(o.partition("=")[2]) for o in cell["overrides"] if "time_limit_s" in o]
        for system in cell["systems"]:
            command = ["-m", "flexgen_bench", f"suite={SUITE}", f"cell={cell['name']}", f"system={system}"]
            if results != ROOT / "results":  # the usual folder would only be one more word in a record's rerun command
                command.append(f"results_dir={results}")
            steps.append(
                Step(
                    f"{cell['name']}:{system}",
                    f"measure {system} in cell {cell['name']} of suite={SUITE}",
                    tuple(command),
                    min(LONGEST_S, limits[-1] + AROUND_A_CELL_S),
                    is_cell=True,
                )
            )
    return steps


class Notes:
    """How each step ended, on disk after every one of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            self.entries = json.loads(path.read_text())

    def is_done(self, step: Step) -> bool:
        return bool(self.entries.get(step.name, {}).get("done"))

    def write(self, step: Step, entry: Mapping[str, Any]) -> None:
        self.entries[step.name] = dict(entry)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".tmp")
        partial.write_text(json.dumps(self.entries, indent=1) + "\n")
        partial.replace(self._path)


def judge(step: Step, returncode: int | None, output: str) -> dict[str, Any]:
    """How a step ended: ``done`` (not to be run again) and ``why`` in a few words. returncode None: its time was
    over."""
    if returncode is None:
        return {"done": False, "why": f"stopped after its {step.limit_s:.0f} s"}
    if step.is_cell:
        lines = [line for line in output.splitlines() if line.startswith('{"records"')]
        statuses = json.loads(lines[-1])["status"] if lines else {}
        # Out of memory or out of time is a result; what could not be tried, or broke, is tried again.
        done = bool(statuses) and not set(statuses) & {"unavailable", "failed", "invalid"}
        return {"done": done, "why": ", ".join(statuses) or f"no record, exit status {returncode}"}
    return {"done": returncode == 0, "why": "ok" if returncode == 0 else f"exit status {returncode}"}


def run_step(step: Step, log: Path) -> dict[str, Any]:
    """Run one step to its end or its limit; its output goes to ``log`` and its last lines to the terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=ROOT,
            env=environment(),
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            returncode: int | None = process.wait(timeout=step.limit_s)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            _end(process)
    output = log.read_text(errors="replace")
    print("\n".join(f"    {line}" for line in output.rstrip().splitlines()[-TAIL_LINES:]))
    ended = {"seconds": round(time.monotonic() - start, 1), "ended_utc": datetime.now(UTC).isoformat()}
    return judge(step, returncode, output) | ended


def environment() -> dict[str, str]:
    """The checkout before anything installed; no hub, quiet threads."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONUNBUFFERED": "1",
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a step. A cell's own processes end with their parents."""
    for signum, patience_s in ((signal.SIGTERM, 20.0), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=patience_s)


def run(
    steps: Sequence[Step],
    notes: Notes,
    logs: Path,
    *,
    again: bool = False,
    for_s: float | None = None,
    budget_s: float | None = None,
    runner: Callable[[Step, Path], dict[str, Any]] = run_step,
) -> int:
    """Run what is not done; returns the exit status. With ``for_s`` no step starts that could end after so many
    seconds. With ``budget_s`` steps end by then, and the first that would not is left out with all that follow."""
    start = time.monotonic()
    for listed in steps:
        step = listed
        if notes.is_done(step) and not again:
            print(f"==> {step.name}: done before ({notes.entries[step.name]['why']})")
            continue
        if for_s is not None and time.monotonic() - start + step.limit_s > for_s:
            print(f"==> {step.name}: not started, it may take {step.limit_s:.0f} s")
            continue
        if budget_s is not None:
            left_s = budget_s - (time.monotonic() - start)
            if left_s < step.expected_s:
                print(f"==> {step.name}: left out with what follows, {left_s:.0f} s are left")
                break
            step = replace(step, limit_s=min(step.limit_s, left_s))
        print(f"==> {step.name}: {step.what}", flush=True)
        entry = runner(step, logs / f"{step.name.replace(':', '-')}.log")
        notes.write(step, entry)
        print(f"==> {step.name}: {entry['why']} after {entry.get('seconds', 0)} s", flush=True)
    return _summary(steps, notes)


def _summary(steps: Sequence[Step], notes: Notes) -> int:
    print("\nsummary")
    for step in steps:
        why = notes.entries.get(step.name, {}).get("why", "not run")
        print(f"  {'done' if notes.is_done(step) else 'open':5} {step.name}: {why}")
    return 0 if all(notes.is_done(step) for step in steps) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check.sh", description=__doc__)
    parser.add_argument("step", nargs="*", help="which steps (default: all); see --list")
    parser.add_argument("--list", action="store_true", help="say what there is and what is done; run nothing")
    parser.add_argument("--again", action="store_true", help="run steps that are done, too")
    parser.add_argument(
        "--for",
        type=float,
        dest="for_s",
        metavar="S",
        help="start no step that could end later than S seconds from now",
    )
    parser.add_argument("--budget", type=float, dest="budget_s", metavar="S", help="a short stay of S seconds")
    parser.add_argument("--quick", action="store_true", help="a short stay with tiny models and no GPU")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args(arguments)
    folder = options.results.absolute() / "benchmarks" / "gpu_check"
    results = options.results.absolute()
    short = options.budget_s is not None or options.quick
    steps = short_steps(results, options.quick) if short else all_steps(results)
    notes = Notes(folder / "steps.json")
    unknown = sorted(set(options.step) - {step.name for step in steps})
    if unknown:
        known = ", ".join(step.name for step in steps)
        print(f"error: step = {unknown[0]!r}: must be one of {known}.", file=sys.stderr)
        return 2
    chosen = [step for step in steps if not options.step or step.name in options.step]
    if options.list:
        for step in chosen:
            print(
                f"{'done' if notes.is_done(step) else 'open':5} {step.name} (at most {step.limit_s:.0f} s): {step.what}"
            )
        return 0
    logs = ROOT / ".cache" / "gpu-check"
    return run(chosen, notes, logs, again=options.again, for_s=options.for_s, budget_s=options.budget_s)


if __name__ == "__main__":
    sys.exit(main())
