"""Which sequences run: before every pass who starts, after it who has ended.

The engine, the simulator and benchmarks drive the same object::

    while not scheduler.is_done:
        batches = scheduler.schedule()
        for step in scheduler.steps(batches): ...
        scheduler.postprocess(ended)

A pass leaves a rank of a pipeline only at its end, since it goes layer by layer over all its micro-batches. For every
rank to have a pass, KV slots fall into as many waves as there are ranks, and each pass is of one wave::

    for wave in cycle(range(scheduler.waves)):
        if scheduler.has_work(wave): batches = scheduler.schedule(wave) ...

A closed job knows all its requests from the start; into an open one they come while it runs (``admission.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from flexgen_bench.core.policy import Policy
from flexgen_bench.schedule.admission import Admission, ClosedAdmission
from flexgen_bench.schedule.generator import pass_steps
from flexgen_bench.schedule.micro_batch import Member, MicroBatch
from flexgen_bench.schedule.passes import LogitRows, OnDevice, RunningGroup, chunk_len, form_micro_batches
from flexgen_bench.schedule.scheduled_job import ScheduledJob
from flexgen_bench.schedule.sequence_group import SequenceGroup
from flexgen_bench.schedule.sequence_groups import SequenceGroups
from flexgen_bench.schedule.steps import Step
from flexgen_bench.schedule.weights import WeightStream

# Which sequences of a sequence group, by their numbers in the job, have come to their end before their ``gen_len``.
Ended = Callable[[SequenceGroup], Collection[int]]


class Planned(Protocol):
    """What a scheduler needs of a memory plan: the job for the step generator, and the KV slots that sequences move
    into."""

    @property
    def job(self) -> ScheduledJob: ...

    @property
    def groups(self) -> SequenceGroups: ...


def nobody(group: SequenceGroup) -> Collection[int]:
    """No sequence ends early."""
    return ()


def always(member: Member) -> bool:
    """Every sequence is greedy: an accelerator can choose its tokens."""
    return True


def ending(member: Member) -> list[int]:
    """Places in the sequence group of the sequences that get a token from this member: their prompt ends here, or they
    decode."""
    if member.token:
        return list(range(member.group.size))
    return [
        place for place, (first, last) in enumerate(member.ranges) if first < last == member.group.prompt_lens[place]
    ]


def last_rows(member: Member) -> Sequence[int]:
    """The rows that generation wants logits of: the last one of every sequence that gets a token."""
    if member.token:  # one row each
        return range(member.group.size)
    return [member.offsets[place + 1] - 1 for place in ending(member)]


class Scheduler:
    """The state of a job between passes: which sequence groups run in which KV slots, and which wait.

    admission: who may start; None for a closed job, that of the plan's requests. on_device: of whom an accelerator may
    choose the tokens.

    Where tokens stay on the accelerator (``ScheduledJob.tokens_stay``), a pass may be scheduled before the one before
    it is over: ``postprocess()`` right after its steps, and ``remove`` when the host has seen who has ended.
    """

    def __init__(
        self,
        policy: Policy,
        plan: Planned,
        logit_rows: LogitRows = last_rows,
        admission: Admission | None = None,
        on_device: OnDevice = always,
    ) -> None:
        self._policy, self._job = policy, plan.job
        self._logit_rows, self._on_device = logit_rows, on_device
        self._kv_slots = range(len(plan.groups.kv_slots))
        self._weights = WeightStream(plan.job)
        self.waves = plan.groups.waves
        self._admissions: list[Admission] = (
            [ClosedAdmission(policy.schedule, plan.groups, wave) for wave in range(self.waves)]
            if admission is None
            else [admission]
        )
        self._running: dict[int, RunningGroup] = {}  # by KV slot
        self._under_way: set[int] = set()  # waves of which a pass has been scheduled and is not over

    @property
    def is_done(self) -> bool:
        """Whether no sequence runs and none waits. Of an open job: for now."""
        return not any(map(self.has_work, range(self.waves)))

    def has_work(self, wave: int) -> bool:
        """Whether a sequence of a wave runs or waits."""
        return bool(self._of(wave)) or not self._admissions[wave].is_empty

    @property
    def running(self) -> list[RunningGroup]:
        """Who takes part in the pass that has begun (of each wave), in the order of their KV slots."""
        return [self._running[kv_slot] for kv_slot in sorted(self._running)]

    @property
    def waiting(self) -> int:
        """Sequences that have not started."""
        return sum(admission.waiting for admission in self._admissions)

    def schedule(self, wave: int = 0) -> list[MicroBatch]:
        """Let sequence groups move in; the micro-batches of the wave's next pass."""
        self.admit(wave)
        self._under_way.add(wave)
        return form_micro_batches(
            self._job,
            [self._running[kv_slot] for kv_slot in self._of(wave)],
            self._policy.gpu_batch_size,
            lambda size: chunk_len(self._policy, size),
            self._logit_rows,
            self._on_device,
        )

    def admit(self, wave: int = 0) -> None:
        """Only let sequence groups move in: all that a pass needs whose steps nobody wants."""
        free = [kv_slot for kv_slot in self._kv_slots[wave :: self.waves] if kv_slot not in self._running]
        for group in self._admissions[wave].admit(free):
            self._running[group.kv_slot] = RunningGroup(group)

    def steps(self, batches: list[MicroBatch]) -> Iterator[Step]:
        """The steps of the pass that ``schedule`` has begun."""
        return pass_steps(self._job, self._weights, batches, self._is_last)

    def postprocess(self, ended: Ended = nobody, wave: int = 0) -> list[SequenceGroup]:
        """After a pass: sequences that have come to their end leave, the others feed their next token in the wave's
        next pass. Returns the sequence groups of which nobody is left: their KV slots are free."""
        self._under_way.discard(wave)
        for kv_slot in self._of(wave):
            one = self._running[kv_slot]
            self._running[kv_slot] = replace(one, token=one.token + 1)
        return self.remove(ended, wave)

    def remove(self, ended: Ended, wave: int = 0) -> list[SequenceGroup]:
        """Between passes of a wave: sequences leave, also before their end. Returns the sequence groups of which nobody
        is left."""
        left = []
        for kv_slot in self._of(wave):
            one = self._running[kv_slot]
            gone = ended(one.group)
            if len(gone) == one.group.size or one.token >= one.group.gen_len:
                del self._running[kv_slot]
                self._admissions[wave].ended(one.token)
                left.append(one.group)
            elif gone:
                self._running[kv_slot] = replace(one, group=one.group.without(gone))
        return left

    def _of(self, wave: int) -> list[int]:
        """The KV slots of a wave in which somebody runs."""
        return sorted(kv_slot for kv_slot in self._running if kv_slot % self.waves == wave)

    @property
    def _is_last(self) -> bool:
        """Whether no pass can follow, of any wave. Sequences that end early may make an earlier one the last: its loads
        were for nothing."""
        over = all(admission.is_over for admission in self._admissions)
        return over and all(
            one.token + 1 >= one.group.gen_len and kv_slot % self.waves in self._under_way
            for kv_slot, one in self._running.items()
        )
