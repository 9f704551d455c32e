"""From the head's hidden states to the next tokens: on the accelerator where they stay, else on the host.

R rows whose logits are needed, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flexgen_bench.core.tiers import Lane
from flexgen_bench.engine.arenas import Arenas
from flexgen_bench.engine.device import Device
from flexgen_bench.engine.generation import Chosen
from flexgen_bench.engine.nan_checks import Health, Watched
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.schedule.generator import TOKEN_BYTES
from flexgen_bench.schedule.micro_batch import MicroBatch
from flexgen_bench.schedule.scheduler import ending
from flexgen_bench.schedule.steps import Step

Head = Callable[[Tensor], Tensor]  # hidden rows (R, hidden) -> logits (R, V)


class Reader(Protocol):
    """What becomes of logits and tokens."""

    def reduce(self, micro_batch: MicroBatch, head: Head, x: Tensor) -> Tensor:
        """On the compute device: the wanted hidden rows (R, hidden) -> what the host needs of their logits."""

    def finish(self, micro_batch: MicroBatch, reduced: Tensor) -> None:
        """On the host: take what ``reduce`` returned."""

    def choose(self, micro_batch: MicroBatch, reduced: Tensor) -> list[Chosen]:
        """The same where tokens stay on the accelerator, and the next pass may have begun: choose the next ones (of a
        micro-batch that samples on the device, ``reduced`` are these, (R,))."""

    def take(self, micro_batch: MicroBatch, chosen: Sequence[Chosen]) -> None:
        """And then, when the pass is over: tell the sequences."""


class TokenHome:
    """The next token of every sequence of a job, where the embedding reads it. Each has one place for as long as its
    sequence group runs."""

    def __init__(self, plan: MemoryPlan, device: Device, arenas: Arenas) -> None:
        self._device = device
        sizes = [kv_slot.size for kv_slot in plan.groups.kv_slots]
        self._first = [sum(sizes[:number]) for number in range(len(sizes))]  # place of a KV slot
        memory = arenas.allocate(plan.job.compute_tier, "tokens", sum(sizes) * TOKEN_BYTES)
        self._tokens = memory.view(torch.int64)
        self._index: dict[tuple[Lane, tuple[int, ...]], Tensor] = {}  # latest of a lane, each on its own stream

    def get(self, step: Step) -> Tensor:
        """(R,) tokens that the micro-batch's sequences go on with, in the order of its rows."""
        where = self._where(step)
        return self._tokens[where] if isinstance(where, slice) else self._tokens.index_select(0, where)

    def put(self, step: Step, tokens: Tensor) -> None:
        """(R,) tokens of the sequences that get one, where the home is."""
        where = self._where(step)
        if isinstance(where, slice):
            self._tokens[where].copy_(tokens)
        else:
            self._tokens.index_copy_(0, where, tokens)

    def _where(self, step: Step) -> slice | Tensor:
        """The places of a micro-batch: neighbours, nearly always."""
        places = self.places(step.micro_batch)
        if places[-1] - places[0] == len(places) - 1:  # they ascend
            return slice(places[0], places[-1] + 1)
        key = (step.lane, places)
        if key not in self._index:
            for old in [one for one in list(self._index) if one[0] is step.lane]:
                del self._index[old]
            index = torch.tensor(places)
            self._index[key] = self._device.to_compute(index) if self._device.is_cuda else index
        return self._index[key]

    def places(self, micro_batch: MicroBatch) -> tuple[int, ...]:
        """Of the sequences that get a token, ascending within a KV slot. The members of a micro-batch are in the order
        of their KV slots."""
        places: list[int] = []
        for member in micro_batch.members:
            group = member.group
            first, whole = self._first[group.kv_slot], group.whole
            if group is whole:
                places += [first + place for place in ending(member)]
                continue
            number = {sequence: place for place, sequence in enumerate(whole.sequences)}
            places += [first + number[group.sequences[place]] for place in ending(member)]
        return tuple(places)


class Made(NamedTuple):
    """Logits, or what is needed of them, or tokens; and the sums that tell whether all they were made of is finite."""

    values: Tensor
    watched: Watched | None


class NextTokens:
    """Carries out the steps after the last layer. reader: who wants what comes of them; home: where tokens that stay on
    the accelerator lie, None if they do not."""

    def __init__(self, device: Device, health: Health, reader: Reader, home: TokenHome | None) -> None:
        self._device, self._health, self._reader, self.home = device, health, reader, home
        # What passes between steps of a micro-batch, by its staging buffer.
        self._found: dict[int, Made] = {}
        self._found_host: dict[int, Made] = {}
        self._new: dict[int, Made] = {}
        self._new_host: dict[int, Tensor] = {}  # sampled by the host, on their way to the accelerator
        # What the sequences have not been told yet: tokens on their way to the host, or there.
        self._untold: deque[tuple[MicroBatch, Made | list[Chosen]]] = deque()

    def clear(self) -> None:
        """Let go of everything: the job is over."""
        for held in (self._found, self._found_host, self._new, self._new_host, self._untold):
            held.clear()
        self.home = None

    def head(self, step: Step, head: Head, x: Tensor) -> None:
        """HEAD: of the wanted rows x (R, hidden)."""
        micro_batch = step.micro_batch
        found = head(x) if micro_batch.samples_on_device else self._reader.reduce(micro_batch, head, x)
        watched = self._health.gather(step) if step.lane.of_accelerator else None
        self._found[step.buffer_index] = Made(found, watched)

    def move_logits(self, step: Step) -> None:
        """MOVE_LOGITS: what sampling needs, to the host."""
        self._found_host[step.buffer_index] = self._to_host(self._found.pop(step.buffer_index))

    def sample(self, step: Step) -> None:
        """SAMPLE, where the step says."""
        micro_batch, number = step.micro_batch, step.buffer_index
        if micro_batch.samples_on_device:
            assert self.home is not None
            logits, watched = self._found.pop(number)
            tokens = logits.argmax(dim=-1)
            self.home.put(step, tokens)
            self._new[number] = Made(tokens, watched)
            return
        found, watched = (self._found_host if number in self._found_host else self._found).pop(number)
        self._health.judge(watched)
        if self.home is None:
            self._reader.finish(micro_batch, found)
            return
        chosen = self._reader.choose(micro_batch, found)
        self._new_host[number] = torch.tensor([one.token for one in chosen])
        self._untold.append((micro_batch, chosen))

    def move_tokens(self, step: Step) -> None:
        """MOVE_TOKENS: those that the accelerator has chosen to the host, those of the host to where they are read."""
        number = step.buffer_index
        if step.micro_batch.samples_on_device:
            self._untold.append((step.micro_batch, self._to_host(self._new.pop(number))))
        else:
            assert self.home is not None
            self.home.put(step, self._device.to_compute(self._new_host.pop(number)))

    def take(self, batches: Sequence[MicroBatch]) -> None:
        """A pass of these is over: tell the sequences. Not on a lane."""
        for _ in range(len(self._untold)):
            micro_batch, new = self._untold.popleft()
            if not any(micro_batch is one for one in batches):  # of the next pass
                self._untold.append((micro_batch, new))
                continue
            if isinstance(new, Made):
                self._health.judge(new.watched)
                new = self._reader.choose(micro_batch, new.values)
            self._reader.take(micro_batch, new)

    def _to_host(self, made: Made) -> Made:
        values, watched = made
        if watched is not None:
            watched = Watched(self._device.to_host(watched.sums), watched.places)
        return Made(self._device.to_host(values), watched)
