"""What systems are predicted to do with a cell: on a machine that is not here, before a run, and beside a
measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexgen_bench.config.cell import Cell
from flexgen_bench.config.paths import shipped_predictions
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.errors import CannotRun, UserError
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.job import Job
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.simulated import Simulated
from flexgen_bench.core.status import Evidence, Status
from flexgen_bench.core.workload import PromptKind, Workload
from flexgen_bench.machine import host as machine
from flexgen_bench.planner.ask import Ask
from flexgen_bench.runner.searches import Searches
from flexgen_bench.store.kept_predictions import FILE, Answer, KeptPredictions

NO_MODEL = "no model"
# What is worth keeping: answers. Whoever asks for what cannot be, or has made a mistake, will change the question.
KEPT = (Status.OK, Status.OOM, Status.UNAVAILABLE)
# Weights and KV cache in 4 bits; of a system that compresses only one of them, that one.
FOUR_BITS = (
    Lossy(weights=Compression(4), kv_cache=Compression(4)),
    Lossy(weights=Compression(4)),
    Lossy(kv_cache=Compression(4)),
)


@dataclass(frozen=True)
class PredictionRequest:
    """A cell to predict. num_prompts: see Job.

    also: where nobody has said what may change of the results, what is shown next to the exact row: of each group the
    first that the system can do.
    """

    cell: Cell
    num_prompts: int | None
    also: tuple[tuple[Lossy, ...], ...] = ()

    @property
    def lossies(self) -> list[Lossy]:
        """All that may be predicted of the cell."""
        groups = [lossy for group in self.also for lossy in group]
        return list(dict.fromkeys([self.cell.spec.lossy, *groups]))

    @property
    def searched(self) -> list[Lossy]:
        """What a policy will have to be searched for: takes seconds."""
        if not self.cell.chooses_policy:
            return []
        return list(dict.fromkeys([self.cell.spec.lossy, *(group[0] for group in self.also)]))


def exactly(cell: Cell) -> PredictionRequest:
    """A cell that is measured here: the job that is run."""
    return PredictionRequest(cell, cell.spec.workload.num_prompts)


def simulate(
    requests: Sequence[PredictionRequest], cache: Path, tell: Callable[[str], None]
) -> Iterator[list[Simulated]]:
    """The rows of each cell: what it says, and what is requested next to that.

    cache: on whose disk files would go, where a profile states no disk, and where policies found are kept. tell: gets a
    line for each cell by its name, and while policies are searched for. Where several are, that is done by as many
    processes as there are cores; the rows are the same.
    """
    kept = KeptPredictions(shipped_predictions(), cache / FILE, tell)
    asks = {
        (n, lossy): _ask(request, lossy, cache)
        for n, request in enumerate(requests)
        for lossy in request.lossies
        if not why_unpredicted(request.cell)
    }
    known = {one: answer for one, ask in asks.items() if (answer := kept.find(ask.key)) is not None}
    to_search = [
        (n, lossy)
        for n, request in enumerate(requests)
        for lossy in request.searched
        if (n, lossy) in asks and (n, lossy) not in known
    ]
    searches = Searches([(asks[one], f"{requests[one[0]].cell.label}, {one[1]}") for one in to_search], tell)
    with searches:
        for number, request in enumerate(requests):
            tell(f"predicting {request.cell.label}")

            def row(lossy: Lossy, number: int = number, request: PredictionRequest = request) -> Simulated:
                one, cell = (number, lossy), request.cell
                if one in known:
                    return _row(cell, asks[one].job, known[one])
                if one not in to_search:
                    return predict(request, lossy, cache)
                answer = _guarded(cell, asks[one].job, lambda: searches.answer(to_search.index(one)))
                if not isinstance(answer, Answer):
                    return answer
                if answer.status in KEPT:
                    kept.keep({asks[one].key: answer})
                return _row(cell, asks[one].job, answer)

            yield list(_rows(request, row))


def _rows(request: PredictionRequest, row: Callable[[Lossy], Simulated]) -> Iterator[Simulated]:
    first = row(request.cell.spec.lossy)
    yield first
    shown = {first.lossy}
    for group in request.also if first.status is not Status.UNAVAILABLE else ():
        for lossy in group:
            if lossy in shown:
                break
            other = row(lossy)
            if other.status is not Status.UNAVAILABLE:
                if other.lossy not in shown:
                    yield other
                shown |= {lossy, other.lossy}
                break


def predict(request: PredictionRequest, lossy: Lossy, cache: Path) -> Simulated:
    """One row. What the system's model refuses, or fails of, is in the row, never raised."""
    cell, ask = request.cell, _ask(request, lossy, cache)
    if reason := why_unpredicted(cell):
        return Simulated(cell.spec, ask.job, cell.model, Status.UNAVAILABLE, reason)
    answer = _guarded(cell, ask.job, ask.answer)
    return _row(cell, ask.job, answer) if isinstance(answer, Answer) else answer


def why_unpredicted(cell: Cell) -> str:
    """Why the system's predictor is not asked; "" if it is. Predictors of systems that know of one device read nothing
    of several, and would answer for one."""
    if cell.model.predictor is None:
        return NO_MODEL
    if cell.spec.hardware.ranks == 1:
        return ""
    try:
        # Systems bring torch, which reports and predictions for one device do without.
        from flexgen_bench.systems.contract import Capabilities
        from flexgen_bench.systems.load_system import check_devices, load_target

        # What is only simulated declares nothing.
        check_devices(load_target(cell.spec.target).capabilities if cell.can_run else Capabilities(), cell.spec)
    except CannotRun as error:
        return str(error)
    except (ImportError, UserError) as error:
        return f"whether it computes on several devices is not known: {error}"
    return ""


def questions(request: PredictionRequest, cache: Path) -> list[Ask]:
    """All that the rows of a cell may be made of. (A system that searches for its policy can do the first of each
    group.)"""
    if why_unpredicted(request.cell):
        return []
    return [_ask(request, lossy, cache) for lossy in request.searched or request.lossies]


def _ask(request: PredictionRequest, lossy: Lossy, cache: Path) -> Ask:
    spec, model = request.cell.spec, request.cell.model
    job = Job(
        shape=spec.model.shape,
        dtype=spec.dtype,
        hardware=filled_in(spec.hardware, cache),
        prompt_len=usual_prompt_len(spec.workload),
        gen_len=spec.workload.gen_len,
        num_prompts=request.num_prompts,
        lossy=lossy,
        max_latency_s=spec.max_latency_s,
    )
    return Ask(spec.system, model.predictor or "", model.constants, _options(request.cell, lossy), job)


def _guarded(cell: Cell, job: Job, answer: Callable[[], Answer]) -> Answer | Simulated:
    """The answer, or the row that says of a mistake in a model: it must not hide the other systems, nor lose a
    measurement."""
    try:
        return answer()
    except Exception as error:
        reason = f"the model failed: {type(error).__name__}: {error}"
        return Simulated(cell.spec, job, cell.model, Status.FAILED, reason)


def _row(cell: Cell, job: Job, answer: Answer) -> Simulated:
    return Simulated(
        *(cell.spec, job, cell.model, answer.status, answer.reason, answer.run),
        tier=answer.tier,
        need_bytes=answer.need_bytes,
        capacity_bytes=answer.capacity_bytes,
    )


def predict_policy(request: PredictionRequest, policy: Mapping[str, Any], cache: Path) -> Simulated | None:
    """The row of a cell under the policy that its system says it has run; None if it does not say one."""
    ran = Policy.stated_in(policy)
    if ran is None:
        return None
    spec = request.cell.spec
    hardware = spec.hardware
    if hardware.accelerator is Accelerator.CUDA:  # it has fitted, whatever the model says
        hardware = replace(hardware, gpu_memory_bytes=None)
    cell = replace(request.cell, spec=replace(spec, policy=ran, max_latency_s=None, hardware=hardware))
    return predict(replace(request, cell=cell), ran.lossy, cache)


def as_recorded(row: Simulated) -> dict[str, Any]:
    """What a record keeps of a prediction for its run (``Record.prediction``); nothing where there is no model."""
    if row.reason == NO_MODEL:
        return {}
    recorded: dict[str, Any] = {
        "evidence": Evidence.SIMULATED.value,
        "machine": row.hardware.name,
        "rates": _whose(row.hardware),
        "status": row.status.value,
    }
    given = row.spec.policy if row.model.follows_policy else None
    if row.prediction is None:
        return recorded | {"reason": row.reason} | _for(None if given is None else to_json(given))
    return (
        recorded
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


def _options(cell: Cell, lossy: Lossy) -> dict[str, Any]:
    """The system's own options, and the policy for one that follows it."""
    options = dict(cell.spec.system_options)
    if not cell.model.follows_policy:
        return options
    policy = cell.spec.policy
    given = None if policy is None else replace(policy, lossy=lossy)
    return options | {"policy": given}
