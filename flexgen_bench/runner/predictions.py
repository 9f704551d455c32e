"""What systems are predicted to do with a cell: on a machine that is not here, before a run, and beside a measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flexgen_bench.core.cell import CellSpec
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.errors import CannotRun, DoesNotFit, UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.prediction import Question
from flexgen_bench.core.processes import cores, process_pool
from flexgen_bench.core.simulated import Simulated, SystemModel
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.planner.predictor import make_predictor
from flexgen_bench.runner import machine

NO_MODEL = "no model"
# Weights and KV cache in 4 bits; of a system that compresses only one of them, that one.
FOUR_BITS = (
    Lossy(weights=Compression(4), kv_cache=Compression(4)),
    Lossy(weights=Compression(4)),
    Lossy(kv_cache=Compression(4)),
)


@dataclass(frozen=True)
class Asked:
    """A cell to predict. num_prompts: see Question.

    also: where nobody has said what may change of the results, what is shown beside the exact row: of each group the first that the system can do.
    """

    spec: CellSpec
    model: SystemModel
    num_prompts: int | None
    also: tuple[tuple[Lossy, ...], ...] = ()


def simulate(
    cells: Sequence[tuple[str, Asked]], cache: Path, tell: Callable[[str], None]
) -> Iterator[list[Simulated]]:
    """The rows of each cell: what it says, and what is asked for beside that.

    cache: on whose disk files would go, where a profile states no disk. tell: gets a line for each cell by its name. Where several policies are
    to be searched for, that is done by as many processes as there are cores; the rows are the same.
    """
    searches = [(n, lossy) for n, (_, asked) in enumerate(cells) for lossy in _searched(asked)]
    workers = min(cores(), len(searches))
    with process_pool(workers) if workers > 1 else nullcontext() as pool:
        begun = {}
        if pool is not None:
            begun = {
                (n, lossy): pool.submit(predict, cells[n][1], lossy, cache) for n, lossy in searches
            }
        for number, (name, asked) in enumerate(cells):
            tell(f"predicting {name}")
            own = {lossy: future for (n, lossy), future in begun.items() if n == number}
            yield list(_rows(asked, partial(_row, asked, cache, tell, own)))


def _searched(asked: Asked) -> list[Lossy]:
    """What a policy will have to be searched for: takes seconds."""
    if not asked.model.follows_policy or asked.spec.policy is not None:
        return []
    return list(dict.fromkeys([asked.spec.lossy, *(group[0] for group in asked.also)]))


def _row(
    asked: Asked,
    cache: Path,
    tell: Callable[[str], None],
    begun: Mapping[Lossy, Future[Simulated]],
    lossy: Lossy,
) -> Simulated:
    """One row, from the process that has begun it; from this one if none has, or if it died (as one may where memory is short)."""
    if lossy in begun:
        try:
            return begun[lossy].result()
        except BrokenExecutor as error:
            tell(f"a process that searched for a policy has died ({error}); searching here")
    return predict(asked, lossy, cache)


def _rows(asked: Asked, row: Callable[[Lossy], Simulated]) -> Iterator[Simulated]:
    first = row(asked.spec.lossy)
    yield first
    shown = {first.lossy}
    for group in asked.also if first.status is not Status.UNAVAILABLE else ():
        for lossy in group:
            if lossy in shown:
                break
            found = row(lossy)
            if found.status is not Status.UNAVAILABLE:
                if found.lossy not in shown:
                    yield found
                shown |= {lossy, found.lossy}
                break


def predict(asked: Asked, lossy: Lossy, cache: Path) -> Simulated:
    """One row. What the system's model refuses, or fails of, is told in the row, never raised."""
    spec, model = asked.spec, asked.model
    question = Question(
        shape=spec.model.shape,
        dtype=spec.dtype,
        hardware=filled_in(spec.hardware, cache),
        prompt_len=usual_prompt_len(spec.workload),
        gen_len=spec.workload.gen_len,
        num_prompts=asked.num_prompts,
        lossy=lossy,
        max_latency_s=spec.max_latency_s,
    )
    if model.predictor is None:
        return Simulated(spec, question, model, Status.UNAVAILABLE, NO_MODEL)
    try:
        predictor = make_predictor(model.predictor, model.constants, _options(asked, lossy))
        prediction = predictor.predict(question)
    except DoesNotFit as error:
        return Simulated(
            *(spec, question, model, Status.OOM, str(error)),
            tier=error.tier,
            need_bytes=error.need_bytes,
            capacity_bytes=error.capacity_bytes,
        )
    except CannotRun as error:
        return Simulated(spec, question, model, error.status, str(error))
    except UserError as error:
        return Simulated(spec, question, model, Status.INVALID, str(error))
    except (
        Exception
    ) as error:  # a model with a mistake in it must not hide the others, nor lose a measurement
        reason = f"the model failed: {type(error).__name__}: {error}"
        return Simulated(spec, question, model, Status.FAILED, reason)
    return Simulated(spec, question, model, Status.OK, prediction=prediction)


def predict_policy(asked: Asked, policy: Mapping[str, Any], cache: Path) -> Simulated | None:
    """The row of a cell under the policy that its system says it has run; None if it does not say one."""
    ran = Policy.stated_in(policy)
    if ran is None:
        return None
    hardware = asked.spec.hardware
    if hardware.accelerator is Accelerator.CUDA:  # it has fitted, whatever the model says
        hardware = replace(hardware, gpu_memory_bytes=None)
    spec = replace(asked.spec, policy=ran, max_latency_s=None, hardware=hardware)
    return predict(replace(asked, spec=spec), ran.lossy, cache)


def as_recorded(row: Simulated) -> dict[str, Any]:
    """What a record keeps of a prediction for its run (``Record.prediction``); nothing where there is no model."""
    if row.reason == NO_MODEL:
        return {}
    found: dict[str, Any] = {
        "evidence": Evidence.SIMULATED.value,
        "machine": row.hardware.name,
        "rates": _whose(row.hardware),
        "status": row.status.value,
    }
    given = row.spec.policy if row.model.follows_policy else None
    if row.prediction is None:
        return found | {"reason": row.reason} | _for(None if given is None else given.to_dict())
    return (
        found
        | _for(row.prediction.settings.get("policy"))
        | {
            "tok_per_s": row.prediction.tok_per_s,
            "prefill_s": row.prediction.prefill_s,
            "decode_s": row.prediction.decode_s,
            "bottleneck": row.prediction.bottleneck,
        }
    )


def _for(policy: Mapping[str, Any] | None) -> dict[str, Any]:
    """The policy that a prediction is for, of a system that has one."""
    return {"policy": dict(policy)} if policy else {}


def filled_in(hardware: HardwareProfile, cache: Path) -> HardwareProfile:
    """The profile with what it leaves to the local machine: host memory and disk."""
    return replace(
        hardware,
        cpu_memory_bytes=hardware.cpu_memory_bytes or machine.memory_bytes(),
        disk_bytes=hardware.disk_bytes or max(1, machine.free_disk_bytes(cache)),
    )


def usual_prompt_len(workload: Workload) -> int:
    """Prompts of mixed length are spread evenly (``prompts.py``): the middle stands for all."""
    if workload.kind is PromptKind.TEXT:
        return (workload.min_prompt_len + workload.prompt_len) // 2
    return workload.prompt_len


def _whose(hardware: HardwareProfile) -> str:
    """Where a profile's rates come from: only measured ones have a spread."""
    measured = hardware.rates is not None and hardware.rates.spread
    return "measured on this machine" if measured else f"stated for {hardware.name}"


def _options(asked: Asked, lossy: Lossy) -> dict[str, Any]:
    """The system's own options, and the policy for one that follows it."""
    options = dict(asked.spec.system_options)
    if not asked.model.follows_policy:
        return options
    policy = asked.spec.policy
    given = None if policy is None else replace(policy, lossy=lossy).to_dict()
    return options | {"policy": given}
