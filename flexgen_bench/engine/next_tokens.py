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
from flexgen_bench.engine.device import Device, crossing
from flexgen_bench.engine.generation import Chosen
from flexgen_bench.engine.nan_checks import Health, Watched
from flexgen_bench.engine.static_decode import StaticDecode
from flexgen_bench.planner.memory_plan import MemoryPlan
from flexgen_bench.schedule.micro_batch import MicroBatch
from flexgen_bench.schedule.scheduler import ending
from flexgen_bench.schedule.steps import TOKEN_BYTES, Step

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

    def get(self, where: slice | Tensor) -> Tensor:
        """(R,) tokens that a micro-batch's sequences go on with, in the order of its rows."""
        return self._tokens[where] if isinstance(where, slice) else self._tokens.index_select(0, where)

    def put(self, where: slice | Tensor, tokens: Tensor) -> None:
        """(R,) tokens of the sequences that get one, where the home is."""
        if isinstance(where, slice):
            self._tokens[where].copy_(tokens)
        else:
            self._tokens.index_copy_(0, where, tokens)

    def where(self, step: Step) -> slice | Tensor:
        """The places of a micro-batch, for the lane of a step: neighbours, nearly always."""
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
    watched: list[Watched]


class Arriving(NamedTuple):
    """Tokens and sums in one copy, (R + sums) float64 in host memory: numbers of tokens are exact in it. watched: whose
    sums they are."""

    both: Tensor
    tokens: int
    watched: list[Watched]


class NextTokens:
    """Carries out the steps after the last layer. reader: who wants what comes of them; home: where tokens that stay on
    the accelerator lie, None if they do not; is_sent: other ranks want the tokens, too."""

    def __init__(
        self, device: Device, health: Health, reader: Reader, home: TokenHome | None, is_sent: bool = False
    ) -> None:
        self._device, self._health, self._reader, self.home = device, health, reader, home
        self._is_sent = is_sent
        self._to_send: deque[tuple[MicroBatch, list[Chosen]]] = deque()  # in the order in which they were chosen
        # What passes between steps of a micro-batch, by its staging buffer.
        self._found: dict[int, Made] = {}
        self._found_host: dict[int, tuple[Tensor, Tensor | None, list[Watched]]] = {}
        self._new: dict[int, Arriving] = {}
        self._new_host: dict[int, Tensor] = {}  # sampled by the host, on their way to the accelerator
        # What the sequences have not been told yet: tokens on their way to the host, or there.
        self._untold: deque[tuple[MicroBatch, Arriving | list[Chosen]]] = deque()

    def clear(self) -> None:
        """Let go of everything: the job is over."""
        for held in (self._found, self._found_host, self._new, self._new_host, self._untold, self._to_send):
            held.clear()
        self.home = None

    def head(self, step: Step, head: Head, x: Tensor) -> None:
        """HEAD: of the wanted rows x (R, hidden)."""
        self.chosen(step, self._reader.reduce(step.micro_batch, head, x))

    def chosen(self, step: Step, found: Tensor) -> None:
        """HEAD: what is needed of the logits; of a micro-batch that samples on the device, the tokens (R,)."""
        watched = self._health.gather(step) if step.lane.of_accelerator else []
        self._found[step.buffer_index] = Made(found, watched)

    def move_logits(self, step: Step) -> None:
        """MOVE_LOGITS: what sampling needs, to the host."""
        found, watched = self._found.pop(step.buffer_index)
        sums = torch.cat([crossing(one.sums) for one in watched]) if watched else None
        on_host = None if sums is None else self._device.to_host(sums)
        self._found_host[step.buffer_index] = (self._device.to_host(found), on_host, watched)

    def sample(self, step: Step, shape: StaticDecode | None = None) -> None:
        """SAMPLE, where the step says. shape: by which the pass is issued."""
        micro_batch, number = step.micro_batch, step.buffer_index
        if micro_batch.samples_on_device:
            assert self.home is not None
            tokens, watched = self._found.pop(number)
            if shape is None:
                both = self._settle(self.home.where(step), tokens, watched)
            else:
                both, watched = self._settle_static(shape, tokens, watched)
            self._new[number] = Arriving(both, len(tokens), watched)
            return
        if number in self._found_host:
            found, sums, watched = self._found_host.pop(number)
            if sums is not None:
                self._health.judge(sums, watched)
        else:
            found, _ = self._found.pop(number)
        if self._is_sent:
            chosen = self._reader.choose(micro_batch, found)
            self._reader.take(micro_batch, chosen)
            self._to_send.append((micro_batch, chosen))
            return
        if self.home is None:
            self._reader.finish(micro_batch, found)
            return
        chosen = self._reader.choose(micro_batch, found)
        self._new_host[number] = torch.tensor([one.token for one in chosen])
        self._untold.append((micro_batch, chosen))

    def chosen_for(self, micro_batch: MicroBatch) -> list[Chosen]:
        """What other ranks are sent: steps that send follow each other as those that sample do."""
        sampled, chosen = self._to_send.popleft()
        assert sampled is micro_batch
        return chosen

    def _settle(self, where: slice | Tensor, tokens: Tensor, watched: list[Watched]) -> Tensor:
        """Tokens (R,) at home; what goes to the host, together."""
        assert self.home is not None
        self.home.put(where, tokens)
        return torch.cat([tokens.double(), *(one.sums.double() for one in watched)])

    def _settle_static(
        self, shape: StaticDecode, tokens: Tensor, watched: list[Watched]
    ) -> tuple[Tensor, list[Watched]]:
        """The same as a piece of a shape: of what was watched, the last are its own sums, which stay where they are.
        Others are those of prompts' chunks that had no logits, and are there once."""
        where, own, others = shape.where, watched[-shape.SUMS :], watched[: -shape.SUMS]
        assert where is not None
        shape.run("sample", lambda: _kept(shape, self._settle(where, tokens, own)))
        both = shape.kept("both")
        if others:
            both = torch.cat([both, *(one.sums.double() for one in others)])
        return both, [*own, *others]

    def move_tokens(self, step: Step) -> None:
        """MOVE_TOKENS: those that the accelerator has chosen to the host, those of the host to where they are read."""
        number = step.buffer_index
        if step.micro_batch.samples_on_device:
            new = self._new.pop(number)
            self._untold.append((step.micro_batch, new._replace(both=self._device.to_host(new.both))))
        else:
            assert self.home is not None
            self.home.put(self.home.where(step), self._device.to_compute(self._new_host.pop(number)))

    def take(self, batches: Sequence[MicroBatch]) -> None:
        """A pass of these is over: tell the sequences. Not on a lane."""
        for _ in range(len(self._untold)):
            micro_batch, new = self._untold.popleft()
            if not any(micro_batch is one for one in batches):  # of the next pass
                self._untold.append((micro_batch, new))
                continue
            if isinstance(new, Arriving):
                self._health.judge(new.both[new.tokens :], new.watched)
                new = self._reader.choose(micro_batch, new.both[: new.tokens].long())
            self._reader.take(micro_batch, new)


def _kept(shape: StaticDecode, both: Tensor) -> None:
    shape.keep("both", both)  # a function without a value
