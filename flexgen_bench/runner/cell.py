"""Run one cell and turn whatever happens into a record."""

from __future__ import annotations

import shutil
import signal
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flexgen_bench.core.cell import CellSpec
from flexgen_bench.core.codec import to_json
from flexgen_bench.core.record import Record, TuningProbe
from flexgen_bench.core.status import Status
from flexgen_bench.core.units import format_bytes, format_seconds
from flexgen_bench.machine.probes import drop_cached_pages
from flexgen_bench.runner import tuning
from flexgen_bench.runner.events import Display
from flexgen_bench.runner.job import CellProcessJob, CellState
from flexgen_bench.runner.launch import Ending, run_guarded
from flexgen_bench.runner.memory_cap import MemoryCap, describe
from flexgen_bench.runner.prepare import Prepared

LOG_LINES = 8


def run_cell(
    spec: CellSpec, prepared: Prepared, cache: Path, workdir: Path, display: Display, environment: Mapping[str, str]
) -> tuple[CellState, MemoryCap]:
    """Measure a cell in a process of its own, under its cap and within its time limit.

    A start that dies of memory does not lose the cell: the next one goes on with the best batch size that is
    known to work, until none is left. environment: of the process (``launch.cell_environment``).
    """
    assert prepared.prompts is not None
    job = CellProcessJob(spec, prepared.checkpoint, workdir / "scratch", cache, prepared.prompts)
    left_s, is_prepared = spec.measure.time_limit_s, False
    while True:
        drop_cached_pages(prepared.checkpoint)
        start = time.monotonic()
        state, ending = _start(job, workdir, display, environment, left_s, spec.hardware.cpu_memory_bytes)
        left_s -= time.monotonic() - start
        if state.stage == "unprepared" and not is_prepared:
            # What it makes is kept; the time and the memory that takes say nothing about the system.
            limit_s = spec.measure.time_limit_s
            making_job = replace(job, prepare_only=True)
            made, making = _start(making_job, workdir, display, environment, limit_s, memory_bytes=None)
            if made.status is not Status.OK:
                return made, making.memory_cap
            is_prepared = True
            continue
        smaller = _without_the_batch_that_died(state)
        if smaller is None:
            return state, ending.memory_cap
        job = replace(job, tuning=smaller, batch_size=tuning.best(smaller))
        display.stage(f"out of memory; going on with batches of {job.batch_size}")


def _start(
    job: CellProcessJob,
    workdir: Path,
    display: Display,
    environment: Mapping[str, str],
    time_limit_s: float,
    memory_bytes: int | None,
) -> tuple[CellState, Ending]:
    """Start the cell's process once; what it left, with a status whatever happened (but "unprepared")."""
    job_path, state_path = workdir / "job.json", workdir / "state.json"
    shutil.rmtree(job.scratch, ignore_errors=True)  # of a start that died
    job.scratch.mkdir()
    job.write(job_path)
    state_path.unlink(missing_ok=True)
    ending = run_guarded(
        [sys.executable, "-m", "flexgen_bench.runner.worker", str(job_path), str(state_path)],
        workdir,
        display,
        environment=environment,
        memory_bytes=memory_bytes,
        time_limit_s=max(0.1, time_limit_s),
    )
    state = CellState.read(state_path)
    unprepared = state.stage == "unprepared" and ending.returncode == 0
    if ending.timed_out or (state.status is None and not unprepared):
        state.status, state.reason = judge(ending, state, job.spec)
    elif state.status is Status.FAILED and ending.memory_cap.oom_kills:
        # A helper process of the system was killed, which the system saw as some other failure.
        why = f"a process was killed for memory; {describe(ending.memory_cap)}"
        state.status, state.reason = Status.OOM, f"{why}:\n{state.reason}"
    return state, ending


def judge(ending: Ending, state: CellState, spec: CellSpec) -> tuple[Status, str]:
    """Status and reason for a process that did not tell its own end."""
    where = f"while in stage '{state.stage}'"
    if state.stage == "probe":
        where = f"while trying batches of {state.batch_size}"
    if ending.timed_out:
        limit = format_seconds(spec.measure.time_limit_s)
        return Status.TIMEOUT, f"time limit of {limit} reached {where}"
    cap = ending.memory_cap
    if cap.oom_kills:
        return Status.OOM, f"killed for memory {where}; {describe(cap)}"
    tail = "\n".join(ending.log.splitlines()[-LOG_LINES:])
    code = ending.returncode
    if code is None:
        how = "its guard process failed"
    elif code < 0:
        how = f"killed by {signal.Signals(-code).name}"
    else:
        how = f"ended with exit status {code} and no result"
    return Status.FAILED, f"{how} {where}" + (f":\n{tail}" if tail else "")


def _without_the_batch_that_died(state: CellState) -> tuple[TuningProbe, ...] | None:
    """Probes with the batch that ran out of memory marked so; None if there is no other batch to go on with."""
    if state.status is not Status.OOM or state.batch_size is None:
        return None
    died = TuningProbe(state.batch_size, None, state.reason)
    others = [probe for probe in state.tuning if probe.batch_size != died.batch_size]
    probes = (*others, died)
    return probes if tuning.best(probes) is not None else None


def make_record(
    spec: CellSpec,
    *,
    suite: str,
    rerun_command: str,
    started: datetime,
    state: CellState,
    cap: MemoryCap,
    environment: Mapping[str, Any],
    prediction: Mapping[str, Any],
    note: str = "",
) -> Record:
    """The record of a cell that has ended in ``state``. note: what of the workload that was asked for has not been run,
    and why."""
    assert state.status is not None
    of_workload = {"workload_note": note} if note else {}
    measured = state.status in (Status.OK, Status.INVALID)
    return Record(
        run_id=f"{started:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}",
        spec_hash=spec.spec_hash,
        spec=to_json(spec),
        suite=suite,
        status=state.status,
        reason=state.reason,
        started_utc=started.isoformat(),
        ended_utc=datetime.now(UTC).isoformat(),
        rerun_command=rerun_command,
        evidence=spec.evidence,
        batch_size=state.batch_size,
        load_s=state.load_s,
        samples=tuple(state.samples),
        warmup_samples=tuple(state.warmup_samples),
        tuning=tuple(state.tuning),
        report=state.report,
        memory_cap=to_json(cap),
        outputs=state.outputs,
        prediction=prediction,
        validity=state.validity | _reasons_for_doubt(state, cap, measured) | of_workload,
        environment=dict(environment)
        | {
            "threads": spec.threads,
            "process": state.process,
            "page_cache": "cached pages of the checkpoint were dropped before each start",
        },
    )


def _reasons_for_doubt(state: CellState, cap: MemoryCap, measured: bool) -> dict[str, Any]:
    """Facts that a reader of the figure must weigh, stated whether they are good or bad."""
    facts: dict[str, Any] = {"memory_cap_enforced": cap.enforced}
    if cap.requested_bytes is not None and not cap.enforced and measured:
        peak = int(state.process.get("peak_resident_bytes", 0))
        facts["peak_within_requested_cap"] = peak <= cap.requested_bytes
        facts["cap_note"] = (
            f"ran without its cap of {format_bytes(cap.requested_bytes)}; resident peak {format_bytes(peak)}"
        )
    return facts
