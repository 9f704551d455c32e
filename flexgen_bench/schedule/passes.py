"""Which micro-batches a pass consists of, given the sequence groups that are running."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexgen_bench.core.policy import Policy
from flexgen_bench.schedule.generator import uses_cpu_attention
from flexgen_bench.schedule.micro_batch import Member, MicroBatch
from flexgen_bench.schedule.scheduled_job import ScheduledJob
from flexgen_bench.schedule.sequence_group import SequenceGroup

# For a member: which of its rows need logits.
LogitRows = Callable[[Member], Sequence[int]]
# For a member: whether an accelerator can choose its next tokens.
OnDevice = Callable[[Member], bool]


@dataclass(frozen=True)
class RunningGroup:
    """A sequence group in its KV slot. token: 0 before its prefill, n when its n-th new token is to be fed."""

    group: SequenceGroup
    token: int = 0


def chunk_len(policy: Policy, size: int) -> int | None:
    """Tokens of each of ``size`` prompts that are computed at once; None: all."""
    return None if policy.prefill_chunk is None else max(1, policy.prefill_chunk // size)


@dataclass
class _BufferTurns:
    """Whose turn it is: of every kind of staging buffer there are ``count``, which the micro-batches of a pass take one
    after the other. The other fields say how many have been taken."""

    count: int
    usual: int = 0
    cpu_attention: int = 0
    prompts: int = 0  # sequence groups whose prompts are computed: the chunks of one gather in one buffer
    kv_parts: int = 0

    def take(self, uses_cpu_attention: bool) -> int:
        """The staging buffer of the next micro-batch. Those that the cpu attends for are all under way at once, so each
        has a further one of its own."""
        if uses_cpu_attention:
            self.cpu_attention += 1
            return self.count + self.cpu_attention - 1
        self.usual += 1
        return (self.usual - 1) % self.count

    @property
    def prompt_buffer(self) -> int:
        return self.prompts % self.count


def form_micro_batches(
    job: ScheduledJob,
    running: Sequence[RunningGroup],
    largest: int,
    chunk_len: Callable[[int], int | None],
    logit_rows: LogitRows,
    on_device: OnDevice,
) -> list[MicroBatch]:
    """One pass. Every sequence group that starts is a micro-batch per chunk of its prompts; sequence groups that decode
    share micro-batches of at most ``largest`` sequences. chunk_len: sequence group size -> tokens of each prompt per
    chunk (None: all). on_device: asked where tokens stay on the accelerator."""
    formed: list[MicroBatch] = []
    turns = _BufferTurns(job.num_buffers)

    def add(members: tuple[Member, ...], chunk: int = 0) -> None:
        rows, start = [], 0
        for member in members:
            rows += [start + row for row in logit_rows(member)]
            start += member.offsets[-1]
        micro_batch = MicroBatch(
            index=len(formed),
            members=members,
            buffer_index=turns.take(uses_cpu_attention(job, members)),
            prompt_buffer=turns.prompt_buffer,
            first_kv_buffer=turns.kv_parts,
            num_kv_buffers=turns.count,
            logit_rows=tuple(rows),
            chunk=chunk,
            samples_on_device=job.tokens_stay and all(map(on_device, members)),
        )
        turns.kv_parts += micro_batch.kv_turns
        formed.append(micro_batch)

    for together in _share([r for r in running if r.token], largest):
        add(tuple(Member(r.group, r.token) for r in together))
    for starting in running:
        if starting.token == 0:
            longest = max(starting.group.prompt_lens)
            size = chunk_len(starting.group.size) or longest
            for number, start in enumerate(range(starting.group.kept, longest, size)):
                add((Member(starting.group, 0, start, start + size),), number)
            turns.prompts += 1
    return formed


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
