"""The process of one cell: ``python -m flexgen_bench.runner.worker JOB.json STATE.json``.

Standard output carries events (``runner/events.py``); the result is the state file, written after every
step. Exit status 0 means that the state file tells how the cell ended, whatever the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flexgen_bench.checkpoints.reader import note_of
from flexgen_bench.core.errors import CannotRun, DoesNotFit
from flexgen_bench.core.record import Sample, SystemReport, TuningProbe
from flexgen_bench.core.status import Status
from flexgen_bench.core.workload import PromptKind
from flexgen_bench.engine.tokenization import TextTokenizer
from flexgen_bench.machine.probes import anonymous_bytes, io_counters, peak_resident_bytes
from flexgen_bench.runner import tuning
from flexgen_bench.runner.events import Emitter, take_stdout
from flexgen_bench.runner.exit_status import ending, first_line, is_out_of_memory
from flexgen_bench.runner.gpu_cap import apply_gpu_cap
from flexgen_bench.runner.job import TRACE_FILE, CellProcessJob, CellState
from flexgen_bench.runner.moments import Moments
from flexgen_bench.store.trace import Trace, encode_trace
from flexgen_bench.systems.contract import Generation, ModelFiles, System
from flexgen_bench.systems.load_system import check_capable, load_target


class Worker:
    """Takes one system through check, tuning, load, warm-up, repetitions and report."""

    def __init__(self, job: CellProcessJob, state_path: Path, emitter: Emitter) -> None:
        self.job, self.spec = job, job.spec
        self.state_path, self.emitter = state_path, emitter
        self.state = CellState(tuning=list(job.tuning))
        self.loaded: int | None = None
        self.moments: Moments | None = None

    def run(self) -> None:
        """Work until the state tells an end. Never raises for what a system does."""
        try:
            self._run()
        except Exception as error:
            self._end(*ending(error))

    def _run(self) -> None:
        self._enter("check", "importing")
        system = self._build()
        system.check()
        self.moments = Moments(self.emitter, system.job_state)
        if not system.is_prepared():
            if not self.job.prepare_only:
                self.state.stage = "unprepared"
                self.state.write(self.state_path)
                return
            system.prepare()
        if self.job.prepare_only:
            self._end(Status.OK, "")
            return
        self.state.process["base_bytes"] = anonymous_bytes()
        batch = self.job.batch_size or self._tune(system)
        if batch is None:
            last = self.state.tuning[-1]
            self._end(Status.OOM, f"no batch size works; {last.batch_size}: {last.reason}")
            return
        self.state.batch_size = batch
        self._enter("load", f"loading for batches of {batch}")
        self._load(system, batch)
        measure, outputs = self.spec.measure, []
        for index in range(measure.warmup):
            self._enter("warmup", f"warm-up {index + 1} of {measure.warmup}")
            self.state.warmup_samples.append(self._repeat(system)[0])
        used = []
        for index in range(measure.repetitions):
            self._enter("measure", f"repetition {index + 1} of {measure.repetitions}")
            before = io_counters()
            sample, token_ids = self._repeat(system)
            after = io_counters()
            self.state.samples.append(sample)
            outputs.append(token_ids)
            used.append(asdict(after - before) if before and after else None)
        self._enter("report", "writing the report")
        self.state.process |= {"io_per_repetition": used, "peak_resident_bytes": peak_resident_bytes()}
        report = _with_peak(system.report())
        note = note_of(self.job.checkpoint)
        self.state.report = replace(report, notes=(*report.notes, *([note] if note else [])))
        self._judge(outputs)
        self.state.outputs = self._outputs(outputs[-1])
        timeline = system.timeline()
        system.close()
        if timeline is not None:  # after closing: writing it takes memory, too
            trace = Trace(self.spec.spec_hash, self.spec.evidence, timeline)
            self.state_path.with_name(TRACE_FILE).write_bytes(encode_trace(trace))
        self._end(self.state.status or Status.OK, self.state.reason)

    def _build(self) -> System:
        """Import the target and make the system. Raises CannotRun for what is not installed."""
        import torch

        torch.set_num_threads(self.spec.threads)
        self.state.process["torch_threads"] = torch.get_num_threads()
        kind = load_target(self.spec.target)
        check_capable(kind, self.spec)
        lengths = {len(prompt) for prompt in self.job.prompts}
        if len(lengths) > 1 and not kind.capabilities.mixed_lengths:
            raise CannotRun(f"{self.spec.system} takes prompts of one length only")
        cap = apply_gpu_cap(self.spec.hardware)
        if cap is not None and not kind.capabilities.gpu_cap:
            cap = {
                **cap,
                "enforced": False,
                "reason": "it allocates past torch, so its own choice of size alone holds it",
            }
        if cap is not None:
            self.state.process["gpu_memory_cap"] = cap
        files = ModelFiles(self.job.checkpoint, self.job.scratch, self.job.cache)
        return kind(self.spec, files)

    def _tune(self, system: System) -> int | None:
        """Try the candidates that earlier starts have not tried; the best size, None if none works."""
        measure, prompts = self.spec.measure, self.job.prompts
        sizes = tuning.candidates(measure.batch_sizes, len(prompts))
        if not sizes:
            return system.default_batch_size()
        if len(sizes) == 1 and not self.state.tuning:
            return sizes[0]  # nothing to choose
        gen_len = min(measure.tuning_gen_len, max(2, self.spec.workload.gen_len))
        while (size := tuning.next_candidate(sizes, self.state.tuning)) is not None:
            self.state.batch_size = size
            self._enter("probe", f"trying batches of {size}")
            try:
                self._load(system, size)
                done = self._generate(system, prompts[:size], gen_len)
                rate, reason = (
                    tuning.projected_rate(size, done.prefill_s, done.decode_s, gen_len, self.spec.workload),
                    "",
                )
            except (CannotRun, DoesNotFit) as error:
                rate, reason = None, str(error)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                rate, reason = None, f"out of memory: {first_line(error)}"
            self.state.tuning.append(TuningProbe(size, rate, reason))
        return tuning.best(self.state.tuning)

    def _load(self, system: System, batch: int) -> None:
        if self.loaded == batch:
            return
        self.loaded = None
        start = time.perf_counter()
        system.load(batch)
        # A system that is loaded already may have little to do for another batch size.
        self.state.load_s = max(self.state.load_s or 0.0, time.perf_counter() - start)
        self.loaded = batch

    def _repeat(self, system: System) -> tuple[Sample, Sequence[Sequence[int]]]:
        workload = self.spec.workload
        done = self._generate(system, self.job.prompts, workload.gen_len)
        sample = Sample(
            prefill_s=done.prefill_s,
            decode_s=done.decode_s,
            prompt_tokens=sum(len(prompt) for prompt in self.job.prompts),
            generated_tokens=sum(len(ids) for ids in done.token_ids),
            decode_tokens=sum(max(0, len(ids) - 1) for ids in done.token_ids),
        )
        return sample, done.token_ids

    def _generate(self, system: System, prompts: Sequence[Sequence[int]], gen_len: int) -> Generation:
        """One generation, looked at while it runs."""
        moments = self.moments
        assert moments is not None
        moments.begin(self.state.stage)
        done = system.generate(prompts, gen_len, moments.tokens)
        moments.end()
        return done

    def _judge(self, outputs: Sequence[Sequence[Sequence[int]]]) -> None:
        """Check what was generated; a wrong number of tokens or an impossible token is no result."""
        gen_len, vocab = self.spec.workload.gen_len, self.spec.model.shape.vocab_size
        checks = {
            "one_output_per_prompt": all(len(o) == len(self.job.prompts) for o in outputs),
            "exact_lengths": all(len(ids) == gen_len for o in outputs for ids in o),
            "inside_vocabulary": all(0 <= t < vocab for o in outputs for ids in o for t in ids),
        }
        agree = all(output == outputs[0] for output in outputs)
        self.state.validity = checks | {"repetitions_agree": agree}
        failed = [name for name, passed in checks.items() if not passed]
        if failed:
            self.state.status = Status.INVALID
            self.state.reason = f"the generated tokens fail: {', '.join(failed)}"

    def _outputs(self, token_ids: Sequence[Sequence[int]]) -> dict[str, Any]:
        lists = [list(ids) for ids in token_ids]
        outputs: dict[str, Any] = {
            "token_ids": lists,
            "sha256": hashlib.sha256(json.dumps(lists).encode()).hexdigest(),
            "prompt_lengths": [len(prompt) for prompt in self.job.prompts],
        }
        if load_target(self.spec.target).capabilities.reference:
            outputs["reference"] = True
        if self.spec.workload.kind is PromptKind.TEXT:
            tokenizer = TextTokenizer(self.job.checkpoint)
            outputs["prompts"] = [tokenizer.text_after((), ids) for ids in self.job.prompts]
            outputs["texts"] = [
                tokenizer.text_after(prompt, ids) for prompt, ids in zip(self.job.prompts, lists, strict=False)
            ]
        return outputs

    def _enter(self, stage: str, text: str) -> None:
        self.state.stage = stage
        self.state.write(self.state_path)
        self.emitter.stage(text)

    def _end(self, status: Status, reason: str) -> None:
        self.state.status, self.state.reason = status, reason
        if status in (Status.OK, Status.INVALID):
            self.state.stage = "done"
        self.state.write(self.state_path)


def _with_peak(report: SystemReport) -> SystemReport:
    """The report with the process's own peak where the system gave none for the host's memory."""
    if "cpu" in report.peak_bytes:
        return report
    return replace(report, peak_bytes={**report.peak_bytes, "cpu": peak_resident_bytes()})


def main(arguments: Sequence[str]) -> int:
    job_path, state_path = map(Path, arguments)
    emitter = take_stdout()
    Worker(CellProcessJob.read(job_path), state_path, emitter).run()
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    # The state is on disk: threads that a library left running must not hold the process up.
    os._exit(status)
