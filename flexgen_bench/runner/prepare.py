"""Bring a cell's checkpoint and prompts into place, before and outside its memory cap and its clock.

``python -m flexgen_bench.runner.prepare REQUEST.json ANSWER.json`` is a process of its own, because the
parent that shows tables never imports torch. Its standard output carries progress events.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexgen_bench.core.cell import CellSpec
from flexgen_bench.core.codec import from_json, to_json
from flexgen_bench.core.errors import CannotRun, StoreError, UserError
from flexgen_bench.core.extras import how_to_install
from flexgen_bench.core.status import Status
from flexgen_bench.runner.events import Display, take_stdout
from flexgen_bench.runner.job import Prompts
from flexgen_bench.runner.launch import cell_environment, run_guarded


@dataclass(frozen=True)
class Prepared:
    """What cells with the same model, dtype and workload share. ``status`` other than OK: why there is nothing."""

    status: Status
    reason: str = ""
    checkpoint: Path = Path()
    prompts: Prompts | None = None


def preparation_key(spec: CellSpec) -> str:
    """Cells with equal keys share one preparation."""
    parts = (to_json(spec.model), spec.dtype.value, to_json(spec.workload))
    return json.dumps(parts, sort_keys=True)


def prepare(spec: CellSpec, cache: Path, workdir: Path, display: Display) -> Prepared:
    """Run the preparing process and return its answer. Never raises for what goes wrong inside it."""
    request, answer = workdir / "prepare.json", workdir / "prepared.json"
    request.write_text(json.dumps({"spec": to_json(spec), "cache": str(cache)}))
    display.stage("preparing the model")
    command = [sys.executable, "-m", "flexgen_bench.runner.prepare", str(request), str(answer)]
    environment = cell_environment(spec.threads, weights=spec.model.weights)
    ending = run_guarded(command, workdir, display, environment=environment)
    if not answer.exists():
        tail = "\n".join(ending.log.splitlines()[-8:])
        how = f"the preparing process ended with status {ending.returncode}"
        return Prepared(Status.FAILED, f"{how}:\n{tail}" if tail else how)
    return from_json(Prepared, json.loads(answer.read_text()), "prepared")


def main(arguments: Sequence[str]) -> int:
    request, answer = map(Path, arguments)
    emitter = take_stdout()
    data = json.loads(request.read_text())
    spec, cache = from_json(CellSpec, data["spec"], "spec"), Path(data["cache"])

    def moved(what: str, done: int, total: int) -> None:
        emitter.progress(what, done, total, "B")

    def tell(prepared: Prepared) -> None:
        partial = answer.with_suffix(".partial")
        partial.write_text(json.dumps(to_json(prepared)))
        partial.replace(answer)

    try:
        from flexgen_bench.checkpoints.prepared import prepare_checkpoint
        from flexgen_bench.runner.prompts import build_prompts

        checkpoint = prepare_checkpoint(spec.model, spec.dtype, cache, moved)
        prompts = build_prompts(spec.workload, checkpoint, spec.model.shape)
    except CannotRun as error:
        tell(Prepared(error.status, str(error)))
    except ModuleNotFoundError as error:
        tell(Prepared(Status.UNAVAILABLE, how_to_install(error.name or str(error))))
    except (UserError, StoreError, OSError) as error:
        # These say in words what is wrong and what to do; anything else is a bug and shows its traceback.
        tell(Prepared(Status.FAILED, f"{type(error).__name__}: {error}"))
    else:
        lists = [[int(token) for token in prompt] for prompt in prompts]
        tell(Prepared(Status.OK, checkpoint=checkpoint, prompts=lists))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
