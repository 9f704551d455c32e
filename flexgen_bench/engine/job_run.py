"""One job being run: pass after pass, until no sequence group is running and none is waiting."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flexgen_bench.core.moment import JobState
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
from flexgen_bench.schedule.steps import StepKind

# Steps after which the host has tokens, though they compute nothing.
_BRINGS_TOKENS = (StepKind.MOVE_TOKENS, StepKind.RECV_TOKENS)


@dataclass
class JobResult:
    """Phase times and what the lanes did in one job, its plan, and the bytes that were allocated for it. decode_path:
    how an accelerator was given its decode passes, in words.

    A pass in which prompts are computed while other sequences decode (continuous schedule) counts as decode.
    """

    prefill_s: float = 0.0
    decode_s: float = 0.0
    plan: MemoryPlan | None = None
    lanes: dict[Lane, LaneUse] = field(default_factory=dict)
    timeline: Timeline = field(default_factory=Timeline)
    allocated: dict[Site, dict[str, int]] = field(default_factory=dict)
    decode_path: str = ""


@dataclass
class _Pass:
    """A pass that was submitted. ends: of each unit, the steps that are waited for, the last of their lanes."""

    wave: int
    batches: list[MicroBatch]
    begin_s: float
    ends: list[dict[Lane, int]]

    @property
    def sequences(self) -> Iterator[int]:
        """Their numbers in the job."""
        return (i for batch in self.batches for member in batch.members for i in member.group.sequences)


class JobRun:
    """Drives an executor through the passes of a scheduler. requests: all that there will be, for progress; none of an
    open job.

    Where tokens stay on the accelerator, the next pass is submitted before this one is waited for: the accelerator goes
    on without a gap, and the host sees tokens, and who has ended, while it is at the next pass. What that one computes
    beyond an end is dropped. ``max_tokens`` is known in advance. Otherwise the host must have seen the tokens before it
    can say what the next pass is fed.

    Of several ranks, each submits a pass of every wave, in the same order, so that each has one to compute while others
    compute theirs. Which pass is next depends on tokens alone, which all get.
    """

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
        overlap: bool = True,
    ) -> None:
        self._prefixes = prefixes
        self._scheduler = scheduler
        self._executor, self._actions = executor, actions
        self._consumer, self._progress, self._result = consumer, progress, result
        self._prompt_total = sum(r.prompt_len for r in requests)
        self._decode_total = sum(r.gen_len - 1 for r in requests)
        self._prompt_done = self._decode_done = 0
        # Of a wave. Kept prefixes are put into the cache and taken out of it when nobody else touches it.
        self._passes_at_once = 2 if job.tokens_stay and overlap and prefixes is None else 1
        self._turn = 0  # the wave that comes next
        self._submitted: deque[_Pass] = deque()
        self._gone: list[SequenceGroup] = []  # have left, though a pass that was submitted has them
        self._latest_s = 0.0  # when the last pass was over
        self._passes, self._requests = 0, len(requests)

    def run(self) -> None:
        """All passes of a closed job."""
        while not self.is_done:
            self.step()

    @property
    def is_done(self) -> bool:
        return self._scheduler.is_done and not self._submitted

    def step(self) -> None:
        """Until the tokens of one more pass are there. Whoever may start starts; sequences that come to their end
        leave, and their room is free for the next pass that is submitted."""
        while (wave := self._due()) is not None:
            self._submit(wave)
        if self._submitted:
            self._finish(self._submitted.popleft())

    def _due(self) -> int | None:
        """The wave whose next pass is to be submitted, if one is: whose turn it is, of those that have work."""
        waves = self._scheduler.waves
        for wave in ((self._turn + further) % waves for further in range(waves)):
            under_way = sum(one.wave == wave for one in self._submitted)
            if under_way < self._passes_at_once and self._scheduler.has_work(wave):
                return wave
        return None

    def state(self) -> JobState:
        """What the job is doing; from the thread that runs it."""
        running, plan = self._scheduler.running, self._result.plan
        prefill = sum(one.group.size for one in running if not one.token)
        decode = sum(one.group.size for one in running) - prefill
        waiting, lanes = self._scheduler.waiting, self._executor.use()
        return JobState(
            passes=self._passes,
            waiting=waiting,
            prefill=prefill,
            decode=decode,
            done=max(0, self._requests - waiting - prefill - decode),
            used_bytes=_totals(self._result.allocated),
            planned_bytes={} if plan is None else _totals(plan.bytes),
            link_bytes={str(lane): use.bytes for lane, use in lanes.items() if lane.is_link},
            busy_s={str(lane): use.busy_s for lane, use in lanes.items()},
        )

    @property
    def kv_slots_in_use(self) -> int:
        return len(self._scheduler.running)

    def remove(self, ended: Ended) -> None:
        """Between passes: let sequences leave before their end."""
        self._gone += self._scheduler.remove(self._leaving(ended))
        self._forget()

    def in_use(self) -> set[int]:
        """Between passes: the numbers of sequences that a pass that was submitted has, though they may have ended."""
        return {number for one in self._submitted for number in one.sequences}

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

    def _submit(self, wave: int) -> None:
        """All steps of a wave's next pass. Where another is to follow at once, who has got all its tokens leaves with
        it."""
        self._turn = (wave + 1) % self._scheduler.waves
        begin_s = time.perf_counter()
        batches = self._scheduler.schedule(wave)
        if self._prefixes is not None:
            self._prefixes.begin(batches)
        ends: defaultdict[int, dict[Lane, int]] = defaultdict(dict)
        for step in self._scheduler.steps(batches):
            lane, number = self._executor.submit(step, self._actions.act)
            if lane.computes or step.kind in _BRINGS_TOKENS:
                ends[step.unit][lane] = number
        self._submitted.append(_Pass(wave, batches, begin_s, list(ends.values())))
        if self._passes_at_once > 1:
            counts = {one.group.index: one.token + 1 for one in self._scheduler.running}
            self._gone += self._scheduler.postprocess(lambda group: self._consumer.full(group, counts[group.index]))

    def _finish(self, one: _Pass) -> None:
        """Wait for a pass's last steps on each unit: the host has the tokens. Then who has ended leaves."""
        for done, tickets in enumerate(one.ends, start=1):
            self._executor.wait(tickets.items())
            self._tell(one.batches, done / len(one.ends))
        self._executor.collect()
        self._actions.take(one.batches)
        leave = self._scheduler.remove if self._passes_at_once > 1 else self._scheduler.postprocess
        self._gone += leave(self._leaving(self._consumer.ended), one.wave)
        self._forget()
        now_s = time.perf_counter()
        self._account(one.batches, now_s - max(one.begin_s, self._latest_s))
        self._latest_s = now_s
        self._passes += 1

    def _forget(self) -> None:
        """Of sequence groups that have left, those that no pass has any more."""
        used = {m.group.index for one in self._submitted for batch in one.batches for m in batch.members}
        for group in self._gone:
            if group.index not in used:
                self._actions.forget(group)
        self._gone = [group for group in self._gone if group.index in used]

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


def _totals(sizes: Mapping[Site, Mapping[str, int]]) -> dict[str, int]:
    """Bytes by tier."""
    return {site.name: sum(parts.values()) for site, parts in sizes.items()}
