"""One job being run: pass after pass, until no sequence group is running and none is waiting."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from flexgen_bench.core.progress import Progress, quiet
from flexgen_bench.core.tiers import Lane, Site
from flexgen_bench.core.timeline import Timeline
from flexgen_bench.engine.actions import Actions, Consumer
from flexgen_bench.engine.executor import Executor, LaneUse
from flexgen_bench.engine.kept_prefix import KeptPrefixes
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.schedule.micro_batch import MicroBatch
from flexgen_bench.schedule.scheduled_job import ScheduledJob
from flexgen_bench.schedule.scheduler import Ended, Scheduler
from flexgen_bench.schedule.sequence_group import SequenceGroup
from flexgen_bench.schedule.sequence_groups import Request


@dataclass
class JobResult:
    """Phase times and what the lanes did in one job, its plan, and the bytes that were allocated for it.

    A pass in which prompts are computed while other sequences decode (continuous schedule) counts as decode.
    """

    prefill_s: float = 0.0
    decode_s: float = 0.0
    plan: MemoryPlan | None = None
    lanes: dict[Lane, LaneUse] = field(default_factory=dict)
    timeline: Timeline = field(default_factory=Timeline)
    allocated: dict[Site, dict[str, int]] = field(default_factory=dict)


class JobRun:
    """Drives an executor through the passes of a scheduler. requests: all that there will be, for progress; none of an
    open job."""

    def __init__(
        self,
        scheduler: Scheduler,
        job: ScheduledJob,
        executor: Executor,
        actions: Actions,
        consumer: Consumer,
        result: JobResult,
        requests: Sequence[Request] = (),
        progress: Progress = quiet,
        prefixes: KeptPrefixes | None = None,
    ) -> None:
        self._prefixes = prefixes
        self._scheduler, self._job = scheduler, job
        self._executor, self._actions = executor, actions
        self._consumer, self._progress, self._result = consumer, progress, result
        self._prompt_total = sum(r.prompt_len for r in requests)
        self._decode_total = sum(r.gen_len - 1 for r in requests)
        self._prompt_done = self._decode_done = 0

    def run(self) -> None:
        """All passes of a closed job."""
        while not self._scheduler.is_done:
            self.step()

    def step(self) -> None:
        """One pass. Whoever may start starts; sequences that come to their end leave, and their room is free for the
        next pass."""
        begin = time.perf_counter()
        batches = self._scheduler.schedule()
        self._actions.begin_pass()
        if self._prefixes is not None:
            self._prefixes.begin(batches)
        self._pass(batches)
        for group in self._scheduler.postprocess(self._leaving(self._consumer.ended)):
            self._actions.forget(group)
        self._account(batches, time.perf_counter() - begin)

    @property
    def kv_slots_in_use(self) -> int:
        return len(self._scheduler.running)

    def remove(self, ended: Ended) -> None:
        """Between passes: let sequences leave before their end."""
        for group in self._scheduler.remove(self._leaving(ended)):
            self._actions.forget(group)

    def _leaving(self, ended: Ended) -> Ended:
        """The same, and what sequences want kept is taken before their place is free."""
        prefixes = self._prefixes
        if prefixes is None:
            return ended

        def noted(group: SequenceGroup) -> Collection[int]:
            gone = list(ended(group))
            prefixes.left(group, gone)
            return gone

        return noted

    def _pass(self, batches: list[MicroBatch]) -> None:
        """Submit all steps of a pass, and wait for its last step on each unit: the host must see the tokens."""
        ends: dict[int, tuple[Lane, int]] = {}
        for step in self._scheduler.steps(batches):
            ticket = self._executor.submit(step, self._actions.act)
            if step.lane.computes:
                ends[step.unit] = ticket
        for done, ticket in enumerate(ends.values(), start=1):
            self._executor.wait([ticket])
            self._tell(batches, done / len(ends))
        self._executor.collect()

    def _account(self, batches: list[MicroBatch], seconds: float) -> None:
        if all(batch.is_prefill for batch in batches):
            self._result.prefill_s += seconds
        else:
            self._result.decode_s += seconds
        for batch in batches:
            if batch.is_prefill:
                self._prompt_done += batch.rows
            else:
                self._decode_done += batch.rows

    def _tell(self, batches: list[MicroBatch], share: float) -> None:
        """Progress within a pass: after each unit, its share of the pass's tokens."""
        prompts = sum(batch.rows for batch in batches if batch.is_prefill)
        if prompts:
            done = self._prompt_done + int(prompts * share)
            self._progress("prefill", done, self._prompt_total)
        decoded = sum(batch.rows for batch in batches if not batch.is_prefill)
        if decoded:
            done = self._decode_done + int(decoded * share)
            self._progress("decode", done, self._decode_total)
