"""What systems are predicted to do with a cell: on a machine that is not here, before a run, and beside a
measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexgen_bench.config.paths import shipped_predictions
from flexgen_bench.core.cell import CellSpec
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.compression import Compression, Lossy
from flexgen_bench.core.hardware import Accelerator, HardwareProfile
from flexgen_bench.core.policy import Policy
from flexgen_bench.core.prediction import Question
from flexgen_bench.core.simulated import Simulated, SystemModel
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
class Asked:
    """A cell to predict. num_prompts: see Question.

    also: where nobody has said what may change of the results, what is shown beside the exact row: of each group the
    first that the system can do.
    """

    spec: CellSpec
    model: SystemModel
    num_prompts: int | None
    also: tuple[tuple[Lossy, ...], ...] = ()


def simulate(cells: Sequence[tuple[str, Asked]], cache: Path, tell: Callable[[str], None]) -> Iterator[list[Simulated]]:
    """The rows of each cell: what it says, and what is asked for beside that.

    cache: on whose disk files would go, where a profile states no disk, and where policies found are kept. tell: gets a
    line for each cell by its name, and while policies are searched for. Where several are, that is done by as many
    processes as there are cores; the rows are the same.
    """
    kept = KeptPredictions(shipped_predictions(), cache / FILE, tell)
    asks = {
        (n, lossy): _question(asked, lossy, cache)
        for n, (_, asked) in enumerate(cells)
        for lossy in _lossies(asked)
        if asked.model.predictor is not None
    }
    known = {one: found for one, ask in asks.items() if (found := kept.find(ask.key)) is not None}
    wanted = [
        (n, lossy)
        for n, (_, asked) in enumerate(cells)
        for lossy in _searched(asked)
        if (n, lossy) in asks and (n, lossy) not in known
    ]
    searches = Searches([(asks[one], f"{cells[one[0]][0]}, {one[1]}") for one in wanted], tell)
    with searches:
        for number, (name, asked) in enumerate(cells):
            tell(f"predicting {name}")

            def row(lossy: Lossy, number: int = number, asked: Asked = asked) -> Simulated:
                one = (number, lossy)
                if one in known:
                    return _simulated(asked, asks[one].question, known[one])
                if one not in wanted:
                    return predict(asked, lossy, cache)
                found = _guarded(asked, asks[one].question, lambda: searches.answer(wanted.index(one)))
                if not isinstance(found, Answer):
                    return found
                if found.status in KEPT:
                    kept.keep({asks[one].key: found})
                return _simulated(asked, asks[one].question, found)

            yield list(_rows(asked, row))


def _lossies(asked: Asked) -> list[Lossy]:
    """All that a cell may be asked for."""
    groups = [lossy for group in asked.also for lossy in group]
    return list(dict.fromkeys([asked.spec.lossy, *groups]))


def _searched(asked: Asked) -> list[Lossy]:
    """What a policy will have to be searched for: takes seconds."""
    if not asked.model.follows_policy or asked.spec.policy is not None:
        return []
    return list(dict.fromkeys([asked.spec.lossy, *(group[0] for group in asked.also)]))


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
    ask = _question(asked, lossy, cache)
    if asked.model.predictor is None:
        return Simulated(asked.spec, ask.question, asked.model, Status.UNAVAILABLE, NO_MODEL)
    found = _guarded(asked, ask.question, ask.answer)
    return _simulated(asked, ask.question, found) if isinstance(found, Answer) else found


def questions(asked: Asked, cache: Path) -> list[Ask]:
    """All that the rows of a cell may be made of. (A system that searches for its policy can do the first of each
    group.)"""
    lossies = _searched(asked) or _lossies(asked)
    return [_question(asked, lossy, cache) for lossy in lossies]


def _question(asked: Asked, lossy: Lossy, cache: Path) -> Ask:
    spec = asked.spec
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
    model = asked.model
    return Ask(spec.system, model.predictor or "", model.constants, _options(asked, lossy), question)


def _guarded(asked: Asked, question: Question, answer: Callable[[], Answer]) -> Answer | Simulated:
    """The answer, or the row that tells of a mistake in a model: it must not hide the other systems, nor lose a
    measurement."""
    try:
        return answer()
    except Exception as error:
        reason = f"the model failed: {type(error).__name__}: {error}"
        return Simulated(asked.spec, question, asked.model, Status.FAILED, reason)


def _simulated(asked: Asked, question: Question, found: Answer) -> Simulated:
    return Simulated(
        *(asked.spec, question, asked.model, found.status, found.reason, found.run),
        tier=found.tier,
        need_bytes=found.need_bytes,
        capacity_bytes=found.capacity_bytes,
    )


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
        return found | {"reason": row.reason} | _for(None if given is None else to_json(given))
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
    given = None if policy is None else to_json(replace(policy, lossy=lossy))
    return options | {"policy": given}
