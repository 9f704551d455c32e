"""Which micro-batches a pass consists of, given the sequence groups that are running."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexgen_bench.core.policy import Policy
from flexgen_bench.schedule.generator import uses_cpu_attention
from flexgen_bench.schedule.job import Job
from flexgen_bench.schedule.micro_batch import Member, MicroBatch
from flexgen_bench.schedule.sequence_group import SequenceGroup

# For a member: which of its rows need logits.
LogitRows = Callable[[Member], Sequence[int]]


@dataclass(frozen=True)
class RunningGroup:
    """A sequence group in its KV slot. token: 0 before its prefill, n when its n-th new token is to be fed."""

    group: SequenceGroup
    token: int = 0


def chunk_len(policy: Policy, size: int) -> int | None:
    """Tokens of each of ``size`` prompts that are computed at once; None: all."""
    return None if policy.prefill_chunk is None else max(1, policy.prefill_chunk // size)


def form_micro_batches(
    job: Job,
    running: Sequence[RunningGroup],
    largest: int,
    chunk_len: Callable[[int], int | None],
    logit_rows: LogitRows,
) -> list[MicroBatch]:
    """One pass. Every sequence group that starts is a micro-batch per chunk of its prompts; sequence groups that decode
    share micro-batches of at most ``largest`` sequences. chunk_len: sequence group size -> tokens of each prompt per
    chunk (None: all)."""
    found: list[MicroBatch] = []
    parts = prompts = plain = apart = 0

    def add(members: tuple[Member, ...], chunk: int = 0) -> None:
        nonlocal parts, plain, apart
        # Staging buffers in turn; micro-batches that are all taken apart at the attention have one of their own each.
        if uses_cpu_attention(job, members):
            buffer_index, apart = job.num_buffers + apart, apart + 1
        else:
            buffer_index, plain = plain % job.num_buffers, plain + 1
        slot = prompts % job.num_buffers
        rows, start = [], 0
        for member in members:
            rows += [start + row for row in logit_rows(member)]
            start += member.offsets[-1]
        batch = MicroBatch(len(found), members, buffer_index, slot, parts, job.num_buffers, tuple(rows), chunk)
        parts += len(batch.kv_parts)
        found.append(batch)

    for together in _share([r for r in running if r.token], largest):
        add(tuple(Member(r.group, r.token) for r in together))
    for starting in running:
        if starting.token == 0:
            longest = max(starting.group.prompt_lens)
            size = chunk_len(starting.group.size) or longest
            for number, start in enumerate(range(starting.group.kept, longest, size)):
                add((Member(starting.group, 0, start, start + size),), number)
            prompts += 1
    return found


def _share(decoding: Sequence[RunningGroup], largest: int) -> list[list[RunningGroup]]:
    """Fill micro-batches with sequence groups in order."""
    groups: list[list[RunningGroup]] = []
    size = 0
    for one in decoding:
        if not groups or size + one.group.size > largest:
            groups.append([])
            size = 0
        groups[-1].append(one)
        size += one.group.size
    return groups
