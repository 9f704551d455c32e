"""A planned job as passes: who runs it (engine, simulator, benchmark) asks for steps and says who has ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

from flexgen_bench.core.policy import Policy
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.planner.staging import chunk_len
from flexgen_bench.schedule.admission import Admission
from flexgen_bench.schedule.cohort import Cohort
from flexgen_bench.schedule.generator import pass_steps
from flexgen_bench.schedule.micro_batch import Member, MicroBatch
from flexgen_bench.schedule.passes import RunningCohort, Wanted, form_micro_batches
from flexgen_bench.schedule.steps import Step
from flexgen_bench.schedule.weights import WeightStream


def ending(member: Member) -> list[int]:
    """Places in the cohort of the sequences that get a token from this member: their prompt ends here, or they decode."""
    if member.token:
        return list(range(member.cohort.size))
    return [
        place
        for place, (first, last) in enumerate(member.ranges)
        if first < last == member.cohort.prompt_lens[place]
    ]


def last_rows(member: Member) -> Sequence[int]:
    """The rows that generation wants logits of: the last one of every sequence that gets a token."""
    if member.token:  # one row each
        return range(member.cohort.size)
    return [member.offsets[place + 1] - 1 for place in ending(member)]


class Program:
    """The state of a job between passes: which cohorts run in which rooms, and which wait."""

    def __init__(self, policy: Policy, plan: MemoryPlan, wanted: Wanted = last_rows) -> None:
        self._policy, self._plan, self._wanted = policy, plan, wanted
        cohorts = plan.cohorts
        self._weights = WeightStream(plan.job)
        self._admission = Admission(
            policy.schedule, len(cohorts.groups), len(cohorts.rooms), cohorts.lifetime
        )
        self._running: dict[int, RunningCohort] = {}  # by room

    @property
    def is_done(self) -> bool:
        return not self._running and self._admission.is_empty

    @property
    def running(self) -> list[RunningCohort]:
        """Who takes part in the pass that has begun, in the order of their rooms."""
        return [self._running[room] for room in sorted(self._running)]

    def begin_pass(self) -> list[MicroBatch]:
        """Let cohorts move in; the micro-batches of the next pass."""
        self.admit()
        return form_micro_batches(
            self._plan.job,
            self.running,
            self._policy.gpu_batch_size,
            lambda size: chunk_len(self._policy, size),
            self._wanted,
        )

    def admit(self) -> None:
        """Only let cohorts move in: all that a pass needs whose steps nobody wants."""
        rooms = self._plan.cohorts.rooms
        free = [room.index for room in rooms if room.index not in self._running]
        for index, room in self._admission.admit(free):
            self._running[room] = RunningCohort(self._plan.cohorts.start(index, rooms[room]))

    def steps(self, batches: list[MicroBatch]) -> Iterator[Step]:
        """The steps of the pass that ``begin_pass`` has begun."""
        return pass_steps(self._plan.job, self._weights, batches, self._is_last)

    def end_pass(
        self, ended: Callable[[Cohort], Collection[int]] = lambda cohort: ()
    ) -> list[Cohort]:
        """``ended`` says which sequences of a cohort have come to their end before their ``gen_len``; they leave, and the others
        feed their next token in the next pass. Returns the cohorts of which nobody is left."""
        left = []
        for room, one in list(self._running.items()):
            gone = ended(one.cohort)
            if len(gone) == one.cohort.size or one.token + 1 >= one.cohort.gen_len:
                del self._running[room]
                self._admission.ended(one.token + 1)
                left.append(one.cohort)
            else:
                cohort = one.cohort.without(gone) if gone else one.cohort
                self._running[room] = replace(one, cohort=cohort, token=one.token + 1)
        return left

    @property
    def _is_last(self) -> bool:
        """Whether no pass can follow. Sequences that end early may make an earlier one the last: its loads were for nothing."""
        return self._admission.is_empty and all(
            r.token + 1 >= r.cohort.gen_len for r in self._running.values()
        )
