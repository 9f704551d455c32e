"""Which micro-batches a pass consists of, given the cohorts that are running."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexgen_bench.core.policy import Policy
from flexgen_bench.schedule.cohort import Cohort
from flexgen_bench.schedule.generator import is_attended_apart
from flexgen_bench.schedule.job import Job
from flexgen_bench.schedule.micro_batch import Member, MicroBatch

# For a member: which of its rows need logits.
Wanted = Callable[[Member], Sequence[int]]


@dataclass(frozen=True)
class RunningCohort:
    """A cohort in its room. token: 0 before its prefill, n when its n-th new token is to be fed."""

    cohort: Cohort
    token: int = 0


def chunk_len(policy: Policy, size: int) -> int | None:
    """Tokens of each of ``size`` prompts that are computed at once; None: all."""
    return None if policy.prefill_chunk is None else max(1, policy.prefill_chunk // size)


def form_micro_batches(
    job: Job,
    running: Sequence[RunningCohort],
    largest: int,
    chunk_len: Callable[[int], int | None],
    wanted: Wanted,
) -> list[MicroBatch]:
    """One pass. Every cohort that starts is a micro-batch per chunk of its prompts; cohorts that decode share
    micro-batches of at most ``largest`` sequences. chunk_len: cohort size -> tokens of each prompt per chunk (None: all)."""
    found: list[MicroBatch] = []
    parts = prompts = plain = apart = 0

    def add(members: tuple[Member, ...], chunk: int = 0) -> None:
        nonlocal parts, plain, apart
        # Staging slots in turn; micro-batches that are all taken apart at the attention have one of their own each.
        if is_attended_apart(job, members):
            stage, apart = job.stages + apart, apart + 1
        else:
            stage, plain = plain % job.stages, plain + 1
        slot = prompts % job.stages
        rows, start = [], 0
        for member in members:
            rows += [start + row for row in wanted(member)]
            start += member.offsets[-1]
        batch = MicroBatch(len(found), members, stage, slot, parts, job.stages, tuple(rows), chunk)
        parts += len(batch.kv_parts)
        found.append(batch)

    for together in _share([r for r in running if r.token], largest):
        add(tuple(Member(r.cohort, r.token) for r in together))
    for starting in running:
        if starting.token == 0:
            longest = max(starting.cohort.prompt_lens)
            size = chunk_len(starting.cohort.size) or longest
            for number, start in enumerate(range(0, longest, size)):
                add((Member(starting.cohort, 0, start, start + size),), number)
            prompts += 1
    return found


def _share(decoding: Sequence[RunningCohort], largest: int) -> list[list[RunningCohort]]:
    """Fill micro-batches with cohorts in order."""
    groups: list[list[RunningCohort]] = []
    size = 0
    for one in decoding:
        if not groups or size + one.cohort.size > largest:
            groups.append([])
            size = 0
        groups[-1].append(one)
        size += one.cohort.size
    return groups
