"""Records of the paper's jobs: where one was run on a table's machine, it stands in place of a simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexgen_bench.core.compression import Lossy
from flexgen_bench.core.errors import UserError
from flexgen_bench.core.metrics import phases_overlap
from flexgen_bench.core.prediction import Prediction
from flexgen_bench.core.record import Record
from flexgen_bench.core.status import Status
from flexgen_bench.core.workload import PromptKind
from flexgen_bench.paper.simulate import PaperJob
from flexgen_bench.report.same_tokens import lossy_of
from flexgen_bench.store.reader import Problem, StoredRecord


@dataclass(frozen=True)
class Recorded:
    """A record that says what it ran: fit for a table of the paper. run: one repetition, None where it ran out of
    memory."""

    stored: StoredRecord
    system: str
    model: str
    machine: str
    prompt_len: int
    gen_len: int
    num_prompts: int
    lossy: Lossy
    settings: Mapping[str, Any]
    run: Prediction | None


def usable(records: Sequence[StoredRecord]) -> tuple[list[Recorded], list[Problem]]:
    """The runs of synthetic prompts that ended OK or out of memory, newest first, and the records whose spec is no
    cell's."""
    kept, problems = [], []
    for stored in sorted(records, key=lambda s: s.age, reverse=True):
        try:
            recorded = _recorded(stored)
        except (KeyError, TypeError, AttributeError, UserError) as error:
            what = f"{type(error).__name__}: {error}"
            message = f"{stored.path}: its spec is not that of a cell ({what}). Measure it again."
            problems.append(Problem(stored.path, message))
            continue
        if recorded is not None:
            kept.append(recorded)
    return kept, problems


def find(records: Sequence[Recorded], system: str, job: PaperJob, options: Mapping[str, Any]) -> Recorded | None:
    """The newest run of ``job`` by ``system``; with ``options``, one that says it ran with other settings is none."""
    for run in records:
        same_job = (run.system, run.model, run.machine, run.prompt_len, run.gen_len) == (
            system,
            job.model,
            job.machine,
            job.prompt_len,
            job.gen_len,
        )
        prompts = job.num_prompts in (None, run.num_prompts)
        if same_job and prompts and run.lossy == job.lossy and job.num_gpus == 1:
            stated = {k: run.settings.get(k) for k in options if k != "batch_size"}
            if all(stated[k] in (options[k], "auto") for k in stated):
                return run
    return None


def _recorded(stored: StoredRecord) -> Recorded | None:
    record = stored.record
    spec = record.spec
    workload, options = spec["workload"], spec.get("system_options") or {}
    if workload["kind"] != PromptKind.SYNTHETIC or record.status not in (Status.OK, Status.OOM):
        return None
    return Recorded(
        stored=stored,
        system=spec["system"],
        model=spec["model"]["shape"]["name"],
        machine=spec["hardware"]["name"],
        prompt_len=workload["prompt_len"],
        gen_len=workload["gen_len"],
        num_prompts=workload["num_prompts"],
        lossy=lossy_of(record),
        settings={**options, **record.report.requested},
        run=_run(record, workload) if record.samples and record.status is Status.OK else None,
    )


def _run(record: Record, workload: Mapping[str, Any]) -> Prediction:
    """The mean repetition: rates over it are all tokens / all time."""
    count = len(record.samples)
    return Prediction(
        prefill_s=math.fsum(s.prefill_s for s in record.samples) / count,
        decode_s=math.fsum(s.decode_s for s in record.samples) / count,
        num_prompts=workload["num_prompts"],
        prompt_len=workload["prompt_len"],
        gen_len=workload["gen_len"],
        batch_size=record.batch_size or workload["num_prompts"],
        overlapped=phases_overlap(record),
    )
